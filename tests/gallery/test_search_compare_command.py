"""The command that compares searched plans: one small run, what it wrote, runs as one table, bad arguments."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from visparse import SparsePlan
from visparse.measure.results import Record

GALLERY = Path(__file__).parents[2] / "gallery"
FOLDERS = (GALLERY / "search", GALLERY / "compensation")
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def written(load_once: Load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one small run of the command wrote."""
    folder = tmp_path_factory.mktemp("compare")
    command = "--grid tiny --prompts 1 --seeds 1 --steps 4 --dense-steps 1 --fewer 2 --device cpu --workers 0 "
    command += "--weigh 1 --refine 1 --no-probe --calibration 1 "
    command += (
        "--targets 0.6 --rows 2 --judge 1 --candidates near,top2,band8,diagonals8,stripes8 --only-kinds tube,stripes "
    )
    command += f"--tries 1 --out {folder / 'c.json'} --png {folder / 'c.png'} --plans {folder / 'plans'}"
    rows = ["--only", "^(searched|uniform|floor|dense, 2|sparse-vdit, eps|(single|compensated) pattern 1)"]
    rows += ["--only-kinds", "tube,first frame"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *command.split(), *rows])
        load_once("compare").main()
    return folder


def test_the_file_has_every_row_and_its_figures(load: Load, written: Path) -> None:
    record = Record.read(written / "c.json")
    assert (record.settings["not_run"], record.settings["failed"]) == ([], [])
    kinds = [row["kind"] for row in record.rows if row["plan"] == "sparse"]
    assert sorted(kinds) == ["compensated", "compensated", "published", "searched", "searched", "single"]
    for row in record.rows:
        if row["plan"] == "sparse":
            assert row["psnr"] > 5
            assert 0 < row["ssim"] <= 1
            assert row["measured_share"] > 0
            assert row["predicted_share"] <= 0.6 or row["kind"] == "published"
            assert row["measured_step_milliseconds"] > 0
            assert row["block_density"] <= 1
            assert (row["warnings"], row["fallbacks"]) == ([], [])
    floor = next(row for row in record.rows if row["plan"] == "floor")
    assert floor["psnr"] > 50
    assert [row["steps"] for row in record.rows if row["plan"] == "fewer-steps"] == [2]
    calibration = {text.prompt for text in load("ablation_clips").calibration_wishes(1)}
    assert len(calibration) == 1
    assert set(record.settings["search"]["settings"]["prompts"]) == calibration
    assert record.settings["search"]["climbs"] == {}
    assert not calibration & {text for text, _ in record.settings["wishes"]}
    assert record.settings["search"]["seconds"]["all"] > 0
    assert record.settings["verdicts"][0]["above"]["single"]["by"] != 0


def test_what_the_search_sees_is_not_judged(load: Load) -> None:
    clips = load("ablation_clips")
    seen = clips.calibration_wishes(8)
    assert clips.calibration_wishes() == seen[:2]
    judged = clips.wishes(32, 4)
    assert not {wish.prompt for wish in seen} & {wish.prompt for wish in judged}
    assert not {wish.seed for wish in seen} & {wish.seed for wish in judged}
    assert len(set(seen)) == len({wish.seed for wish in seen}) == 8
    with pytest.raises(ValueError, match="calibration: wanted 1 to 8 prompts, got 9"):
        clips.calibration_wishes(9)


def test_runs_are_merged(load: Load, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record.read(written / "c.json")
    others = [row for row in record.rows if row["plan"] == "sparse" and row["kind"] != "searched"]
    dense, floor = (next(row for row in record.rows if row["plan"] == plan) for plan in ("dense", "floor"))
    known = {"label": "fast", "seconds_denoise": 0.0, "attention_seconds": dense["attention_seconds"] / 4}
    searched = [row for row in record.rows if row["plan"] == "sparse" and row["kind"] == "searched"]
    parts = [
        replace(record, rows=[dense, floor, *searched]),
        replace(
            record,
            rows=[{**dense, "attention_seconds": 9.0}, *others, {**others[0], **known}],
            date="2026-12-01T00:00:00+00:00",
        ),
    ]
    paths = [part.write(tmp_path / f"{n}.json") for n, part in enumerate(parts)]
    out = tmp_path / "both.json"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--table", *map(str, paths), "--out", str(out)])
    load("compare").main()
    both = Record.read(out)
    assert both.date == "2026-12-01T00:00:00+00:00"
    assert {row["label"] for row in both.rows} == {
        "fast",
        *(row["label"] for row in record.rows if row["plan"] != "fewer-steps"),
    }
    by_label = {row["label"]: row for row in both.rows}
    assert by_label["dense"]["attention_seconds"] == dense["attention_seconds"]
    assert by_label["fast"]["attention_cost"] == pytest.approx(0.25)
    assert [by_label[row["label"]]["part"] for row in (dense, searched[0], others[0])] == [0, 0, 1]
    assert len(both.settings["parts"]) == 2
    assert both.settings["verdicts"][0]["above"]["single"]["by"] == pytest.approx(
        record.settings["verdicts"][0]["above"]["single"]["by"]
    )
    merged = load("compare_merge").merged
    assert merged({"a": record}) == record
    for name, other in (
        ("device", replace(record, device={**record.device, "name": "abacus"})),
        ("calibration", replace(record, settings={**record.settings, "calibration": 2})),
    ):
        with pytest.raises(ValueError, match=f"b: it ran on abacus|b: its {name} is 2, that of a is 1"):
            merged({"a": record, "b": other})


def test_plans_can_be_used_and_the_picture_is_there(written: Path) -> None:
    plans = [SparsePlan.from_pretrained(path) for path in (written / "plans").glob("*.json")]
    assert len(plans) == 6
    searched = next(plan for plan in plans if plan.name.startswith("searched, plain"))
    assert searched.measured["predicted"]["attention"] <= 0.6
    assert (written / "c.png").stat().st_size > 1000


def test_the_table_prints_from_the_file(
    load: Load, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--table", str(written / "c.json")])
    load("compare").main()
    text = capsys.readouterr().out
    for row in json.loads((written / "c.json").read_text())["rows"]:
        assert row["label"][:52] in text
    assert "at 60.0%: searched" in text


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "wanted --out FILE, or --table FILE"),
        (["--table", "a", "b", "--out", "b"], "--out: wanted another file than those of --table, got b"),
        (["--out", "x", "--calibration", "9"], "--calibration: wanted 1 to 8 prompts, got 9"),
        (["--out", "x", "--targets", "0.5", "25"], "--targets: wanted shares between 0 and 1, got [0.5, 25.0]"),
        (["--out", "x", "--steps", "5"], "--steps: wanted at least --dense-steps + 3"),
    ],
)
def test_bad_arguments(load: Load, capsys: pytest.CaptureFixture, command: list[str], text: str) -> None:
    with pytest.raises(SystemExit):
        load("compare").parse_arguments(command)
    assert text in capsys.readouterr().err
