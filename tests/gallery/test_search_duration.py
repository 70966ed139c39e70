"""How long a search takes is measured on random weights: one tiny run of the command."""

import importlib
import sys
from pathlib import Path

import pytest

from visparse.measure.results import Record

FOLDER = Path(__file__).parents[2] / "gallery" / "search"


@pytest.mark.parametrize("more", [[], ["--memory"]])
def test_it_writes_what_each_part_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    out = tmp_path / "d.json"
    command = (
        "--model wan-1.3b-480p --layers 1 --grid 3,8,8 --device cpu --steps 4 --candidates near,top --attention 0.95"
    )
    monkeypatch.setattr(sys, "argv", ["duration.py", *command.split(), *more, "--out", str(out)])
    importlib.import_module("duration").main()
    sys.modules.pop("duration")
    (row,) = Record.read(out).rows
    assert row["scored_calls"] == (1 if more else 4)
    assert row["seconds"] >= row["seconds_score"] > 0
    assert row["not_scored"] == []
    assert row["family"] in ("plain", "foveal")
