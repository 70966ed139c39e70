"""What `run` and `demo` do once they have settings: compare, print, write."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from visparse.cli.progress import Bar, wants_bar
from visparse.measure.results import Record
from visparse.measure.settings import RunSettings
from visparse.page import write_outputs
from visparse.page.numbers import COLUMNS, column_table
from visparse.run import Comparison, compare, model_name


def run_and_show(settings: RunSettings, *, out: str | None, as_json: bool) -> int:
    """Compare, write the page and the record, print the table or the JSON.

    Args:
        settings: what to compare.
        out: folder to write to; None: `visparse_out/` and the model's name.
        as_json: standard output carries the record and nothing else.

    Returns:
        Exit code 0.
    """
    folder = Path(out) if out else Path("visparse_out") / model_name(settings.model).replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    found = _compare(settings)
    page = write_outputs(folder, found.record, found.films)
    if as_json:
        print(found.record.to_json())
        print(f"page: {page}", file=sys.stderr)
        return 0
    print(table_text(found.record))
    print(f"page: {page}")
    return 0


def table_text(record: Record) -> str:
    """The record as a table for a terminal, with what a figure needs beside it."""
    cells = [[name for name, _ in COLUMNS], *column_table(record)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(_align(text, widths[i], i) for i, text in enumerate(line)).rstrip() for line in cells]
    settings, first = record.settings, record.rows[0]
    threads = f", {record.device['threads']} threads" if "threads" in record.device else ""
    head = (
        f"{first['model']} on {record.device['name']}{threads}, {first['dtype']}, "
        f"{settings['num_frames']} frames of {settings['width']} × {settings['height']}, "
        f"{settings['num_inference_steps']} steps, seed {first['seed']}: {first['prompt']!r}"
    )
    notes = [f"note: {note}" for note in settings["notes"]]
    loading = f"loading took {settings['load_seconds']:.1f} s, not counted"
    return "\n".join([head, "", *lines, "", loading, *notes])


def _align(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)


def _hide_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _compare(settings: RunSettings) -> Comparison:
    if not wants_bar():
        _hide_loading_bars()
        return compare(settings)
    with closing(Bar()) as bar:
        return compare(settings, progress=bar)
