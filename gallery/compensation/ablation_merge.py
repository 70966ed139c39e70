"""Several results of the ablation as one table, and what of it need not run again."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablation_cases import StaticChoice

from visparse.measure.results import Record
from visparse.patterns.registry import pattern_from_dict

SAME = ("grid", "pixels", "steps", "dense_steps", "wishes")
_SAID = {*SAME, "notes", "static", "not_run", "failed", "floor"}


def check_same(
    settings: Mapping[str, Any],
    other: Mapping[str, Any],
    name: str,
    *,
    keys: Sequence[str] = SAME,
    instead: str = "wanted",
) -> None:
    """Check that rows of two runs can stand in one table.

    Args:
        settings: of the first run.
        other: of the second one.
        name: of the second one, for the error.
        keys: the settings that must agree.
        instead: what the error calls those of the first run.

    Raises:
        ValueError: clips, sizes or steps differ.
    """
    for key in keys:
        if settings[key] != other[key]:
            raise ValueError(f"{name}: its {key} is {str(other[key])[:80]}, {instead} {str(settings[key])[:80]}")


def check_device(first: Record, other: Record, first_name: str, name: str) -> None:
    """Check that two runs were made on one kind of device.

    Raises:
        ValueError: they were not.
    """
    if other.device["name"] != first.device["name"]:
        raise ValueError(f"{name}: it ran on {other.device['name']}, {first_name} on {first.device['name']}")


def parts_of(records: Sequence[Record], said: Container[str]) -> list[dict[str, Any]]:
    """Date, commit, versions and settings of each run, for the settings of the record that they become.

    Args:
        records: of the runs.
        said: settings that all share, or that the new record has in another place.
    """
    return [
        {
            "date": one.date,
            "commit": one.commit,
            "versions": one.versions,
            "settings": {key: value for key, value in one.settings.items() if key not in said},
        }
        for one in records
    ]


def merged(records: Mapping[str, Record]) -> Record:
    """Put the rows of several runs into one record; a single one stays as it is.

    Dense runs are those of the first. Of sparse rows with one name the last counts. The best static patterns are those
    that the first run with such a density found: rows with others are left out, and named in `left_out`, since their
    names do not tell. Each row's time is judged within its own run; `part` says which.

    Args:
        records: path -> what that file holds.

    Returns:
        Device, versions, date and commit of the last; those of all are in `parts` of the settings.

    Raises:
        ValueError: clips, sizes, steps or devices differ.
    """
    (first_name, first), *others = records.items()
    if not others:
        return first
    for name, record in others:
        check_same(first.settings, record.settings, name)
        check_device(first, record, first_name, name)
    static = _static_of(list(records.values()))
    rows: dict[str, dict[str, Any]] = {}
    left_out = []
    for part, (name, record) in enumerate(records.items()):
        for row in record.rows:
            if not _is_chosen(row, static):
                left_out.append(f"{row['label']} ({Path(name).name})")
            elif row["plan"] == "sparse" or part == 0:
                rows[row["label"]] = {**row, "part": part}
    last = list(records.values())[-1]
    names = dict.fromkeys(label for record in records.values() for label in record.settings["not_run"])
    failed = [text for record in records.values() for text in record.settings["failed"]]
    settings = {
        **{key: first.settings[key] for key in SAME},
        "floor": first.settings["floor"],
        "notes": first.settings["notes"],
        "static": static,
        "left_out": left_out,
        "not_run": [label for label in names if label not in rows],
        "failed": [text for text in failed if text.split(": ")[0] not in rows],
        "parts": parts_of(list(records.values()), _SAID),
    }
    return replace(last, settings=settings, rows=list(rows.values()))


def known_choices(static: Sequence[Mapping[str, Any]], target: float) -> list[StaticChoice]:
    """The best static patterns that an earlier run found for a density; empty where it looked for none.

    Args:
        static: of the earlier run's settings.
        target: block density.
    """
    found: dict[str, list[Any]] = {}
    for entry in static:
        if entry["target"] == target:
            found.setdefault(entry["family"], []).append(pattern_from_dict(entry["pattern"]))
    return [StaticChoice(family, target, masks, tiles) for family, (masks, tiles) in found.items()]


def _static_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        for entry in record.settings["static"]:
            found.setdefault((entry["target"], entry["family"], entry["with"]), entry)
    return list(found.values())


def _is_chosen(row: Mapping[str, Any], static: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row's pattern is one of the chosen ones; rows that were not chosen for a density always are."""
    if not row.get("static") or row["target"] is None:
        return True
    patterns = [entry["pattern"] for entry in static if entry["target"] == row["target"]]
    return row["definition"]["patterns"]["pattern"] in patterns
