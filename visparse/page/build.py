"""Fill the page from a result record and the frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visparse.measure.results import Record
from visparse.page import pictures
from visparse.page.numbers import COLUMNS, column_table, fact_list, headline, verdict

STILLS = 6


def build_page(record: Record, films: Mapping[str, torch.Tensor]) -> str:
    """The page as one HTML text without any outside asset.

    Args:
        record: a record of kind `run`; its first row is the dense one.
        films: label of each row -> frames `[frames, height, width, 3]`, uint8.

    Returns:
        HTML.

    Raises:
        ValueError: a row has no film, or the record is of another kind.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    _check(record, films)
    labels = [str(row["label"]) for row in record.rows]
    small = {label: pictures.fit_frames(films[label]) for label in labels}
    dense = small[labels[0]]
    maps = {label: pictures.difference(small[label], dense) for label in labels[1:]}
    factor = pictures.amplification(list(maps.values()))
    painted = {label: pictures.paint_difference(values, factor) for label, values in maps.items()}
    fps = float(record.settings["fps"])
    blank = torch.zeros_like(dense)
    film = torch.cat(
        [
            pictures.join_films([small[label] for label in labels]),
            pictures.join_films([painted.get(label, blank) for label in labels]),
        ],
        dim=1,
    )
    stills = pictures.pick_stills(dense.shape[0], STILLS)
    cards = [
        {
            "label": label,
            "row": row,
            "place": index * 100 / max(len(labels) - 1, 1),
            "verdict": verdict(row),
            "strip": _strip(small[label], stills),
            "difference_strip": _strip(painted[label], stills) if label in painted else None,
        }
        for index, (label, row) in enumerate(zip(labels, record.rows, strict=True))
    ]
    environment = Environment(
        loader=PackageLoader("visparse.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        settings=record.settings,
        record=record,
        cards=cards,
        headline=headline(record),
        columns_text=COLUMNS,
        table=column_table(record),
        facts=fact_list(record),
        film=pictures.data_uri(*pictures.encode_film(film, fps)),
        columns=len(labels),
        height=dense.shape[1],
        width=dense.shape[2],
        scaled=films[labels[0]].shape[2] > pictures.MAX_WIDTH,
        factor=factor,
        stills=[index + 1 for index in stills],
    )


def write_outputs(folder: str | os.PathLike[str], record: Record, films: Mapping[str, torch.Tensor]) -> Path:
    """Write `result.json`, `index.html` and one animation per row.

    Args:
        folder: made where it is missing; files of the same names are replaced.
        record, films: as for `build_page`.

    Returns:
        Path of the page.
    """
    target = Path(folder)
    page = build_page(record, films)
    record.write(target / "result.json")
    for index, row in enumerate(record.rows):
        data, kind = pictures.encode_film(films[str(row["label"])], float(record.settings["fps"]))
        (target / f"{index}-{_file_name(str(row['label']))}.{kind}").write_bytes(data)
    path = target / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _strip(frames: torch.Tensor, stills: list[int]) -> str:
    return pictures.data_uri(*pictures.encode_still(torch.cat([frames[index] for index in stills], dim=1)))


def _file_name(label: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split()) or "film"


def _check(record: Record, films: Mapping[str, Any]) -> None:
    if record.kind != "run":
        raise ValueError(f"record: a page is made of kind 'run', got {record.kind!r}")
    missing = [str(row["label"]) for row in record.rows if row["label"] not in films]
    if missing:
        raise ValueError(f"films: no frames for {', '.join(missing)}")
