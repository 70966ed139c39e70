"""Rows of several runs of the comparison as one record."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ablation_merge import check_device, check_same, parts_of
from ablation_rows import judged
from compare_table import verdicts

from visparse.measure.results import Record

SAME = ("grid", "pixels", "steps", "dense_steps", "wishes", "calibration")
_LISTS = ("singles", "no_size", "not_tried", "failed")
_SAID = {*SAME, *_LISTS, "notes", "tuned", "verdicts", "not_run"}


def merged(records: Mapping[str, Record]) -> Record:
    """Put the rows of several runs into one record.

    Dense runs are those of the first; of sparse rows with one name the last counts. Times of sparse steps were compared
    with dense ones of the same run; what a whole run takes is compared with the dense runs that are kept.

    Args:
        records: file name -> what it holds, at least one.

    Returns:
        Device, versions, date and commit of the last; those of all, with their settings, are in `parts`, and `part` of
        each row says which it is of.

    Raises:
        ValueError: devices, or settings that all rows depend on, differ.
    """
    (first_name, first), *others = records.items()
    if not others:
        return first
    last = first
    for name, last in others:
        check_device(first, last, first_name, name)
        check_same(_known(first), _known(last), name, keys=SAME, instead=f"that of {first_name} is")
    rows: dict[str, dict[str, Any]] = {}
    for part, record in enumerate(records.values()):
        for row in record.rows:
            if row["plan"] in ("sparse", "elsewhere") or row["label"] not in rows:
                rows[row["label"]] = {**row, "part": part}
    found = judged(list(rows.values()), first.settings["steps"])
    everything = [record.settings for record in records.values()]
    settings: dict[str, Any] = {
        **_known(first),
        "notes": [*first.settings["notes"], "rows are of several runs, see parts; dense runs are those of the first"],
        **{key: [one for settings in everything for one in settings.get(key, [])] for key in _LISTS},
        "tuned": {key: one for settings in everything for key, one in settings.get("tuned", {}).items()},
        "not_run": [f"{name} (part {part})" for part, one in enumerate(everything) for name in one["not_run"]],
        "verdicts": verdicts(found),
        "parts": parts_of(list(records.values()), _SAID),
    }
    return replace(last, settings=settings, rows=found)


def _known(record: Record) -> dict[str, Any]:
    """What all rows depend on; None for what an earlier form of the record did not have."""
    return {key: record.settings.get(key) for key in SAME}
