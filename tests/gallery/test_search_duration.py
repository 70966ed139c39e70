"""How long a search takes is measured on random weights: tiny runs of the command."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from visparse.measure.results import Record

FOLDER = Path(__file__).parents[2] / "gallery" / "search"
COMMAND = "--model wan-1.3b-480p --layers 1 --grid 3,8,8 --device cpu --steps 4 --candidates near,top --attention 0.95"


def row_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    """Run the command, and return what it wrote."""
    monkeypatch.syspath_prepend(str(FOLDER))
    out = folder / "d.json"
    monkeypatch.setattr(sys, "argv", ["duration.py", *COMMAND.split(), *more, "--out", str(out)])
    importlib.import_module("duration").main()
    sys.modules.pop("duration")
    (row,) = Record.read(out).rows
    return dict(row)


@pytest.mark.parametrize("more", [["--no-probe", "--every", "0.05"], ["--memory"]])
def test_it_writes_what_each_part_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, more: list[str]
) -> None:
    row = row_of(tmp_path, monkeypatch, *more)
    assert row["scored_calls"] == (1 if "--memory" in more else 4)
    assert row["seconds"] >= row["seconds_score"] > 0
    assert row["not_scored"] == []
    assert row["not_chosen"] is None
    assert row["family"] in ("plain", "foveal")
    assert row["families"] == ["foveal", "plain"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("calls scored")]
    assert [name for name in ("prepare", "score", "choose") if any(f" {name}, step" in line for line in lines)] == [
        "prepare",
        "score",
        "choose",
    ]
    assert lines[-1].endswith(f"choose, step 4, {row['scored_calls']} calls scored")
    assert len(lines) > 4 or "--memory" in more


def test_time_that_is_over_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(tmp_path, monkeypatch, "--no-probe", "--seconds", "0.001")
    assert row["scored_calls"] == 0
    assert "the time for the search was over" in row["not_scored"][0]
    assert row["not_chosen"] == "nothing was scored; give it more --seconds"
    assert row["family"] is None
