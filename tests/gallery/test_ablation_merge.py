"""Several results of the ablation: merged, and not run twice; rows of refresh by overlap say what was decided."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from visparse.compensation.refresh import Overlap
from visparse.measure.results import Record
from visparse.patterns import Neighborhood

GALLERY = Path(__file__).parents[2] / "gallery"
FOLDERS = (GALLERY / "compensation",)
SMALL = GALLERY / "results" / "ablation_small_h200.json"
WITH_STATISTICS = [f"neighborhood + {what} @ 12.5%" for what in ("statistics", "statistics + residual")]
Load = Callable[[str], ModuleType]


def records() -> dict[str, Record]:
    """The first two runs behind the merged result; in the second one two rows have a window of their own."""
    whole = Record.read(SMALL)
    other = {"patterns": {"pattern": Neighborhood(window=(9, 12, 12)).to_dict()}}
    found = {}
    for part, name in enumerate(("small", "more")):
        rows = [{key: row[key] for key in row if key != "part"} for row in whole.rows if row["part"] == part]
        if part == 1:
            own = [row for row in whole.rows if row["label"] in WITH_STATISTICS]
            rows = [whole.rows[0], *rows, *({**row, "definition": other} for row in own)]
        about = whole.settings["parts"][part]
        left = {"not_run": [*whole.settings["not_run"], *WITH_STATISTICS[: 2 - 2 * part]], "left_out": [], "parts": []}
        settings = {**whole.settings, **about["settings"], **left}
        found[f"results/{name}.json"] = replace(
            whole, rows=rows, settings=settings, date=about["date"], commit=about["commit"]
        )
    return found


def small() -> Record:
    return next(iter(records().values()))


def labels(record: Record) -> list[str]:
    return [row["label"] for row in record.rows]


def test_merged_results_have_the_sparse_rows_of_all_and_the_dense_ones_of_the_first(load: Load) -> None:
    first, more = records().values()
    one = load("ablation_merge").merged(records())
    assert [row for row in one.rows if row["part"] == 0] == [{**row, "part": 0} for row in first.rows]
    added = [row["label"] for row in one.rows if row["part"] == 1]
    assert "foveal, residual in fp8 @ 12.5%" in added
    assert not [label for label in added if label.startswith("dense")]
    assert not set(one.settings["not_run"]) & set(labels(one))
    assert "decay + statistics + residual @ 12.5%" in one.settings["not_run"]
    assert [part["settings"]["repeats"] for part in one.settings["parts"]] == [3, 1]
    assert (one.date, one.commit) == (more.date, more.commit)
    assert Record.from_dict(json.loads(one.to_json())).rows == one.rows


def test_rows_with_other_static_patterns_than_the_first_are_left_out(load: Load) -> None:
    """The second run tried one window, the first took the best of four: one table would compare two windows."""
    one = load("ablation_merge").merged(records())
    assert sorted(one.settings["left_out"]) == sorted(f"{name} (more.json)" for name in WITH_STATISTICS)
    assert not set(WITH_STATISTICS) & set(labels(one))
    assert set(WITH_STATISTICS) <= set(one.settings["not_run"])
    assert "left out, with other static patterns: neighborhood" in load("ablation_table").table(one.rows, one.settings)


def test_the_last_row_of_a_name_counts(load: Load) -> None:
    first = small()
    name = "neighborhood, dropped @ 12.5%"
    again = [{**row, "psnr": 1.5} for row in first.rows if row["label"] in ("dense, 4 steps", name)]
    one = load("ablation_merge").merged({"a": first, "b": replace(first, rows=again)})
    assert labels(one) == labels(first)
    psnr = {row["label"]: (row.get("psnr"), row["part"]) for row in one.rows}
    assert psnr[name] == (1.5, 1)
    assert psnr["dense, 4 steps"][1] == 0


def test_one_result_stays_as_it_is(load: Load) -> None:
    first = small()
    assert load("ablation_merge").merged({"a": first}) is first


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"settings": {"steps": 20}}, "b: its steps is 20, wanted 12"),
        ({"settings": {"grid": "long"}}, "b: its grid is long, wanted small"),
        ({"device": {"name": "another"}}, "b: it ran on another, a on NVIDIA H200"),
    ],
)
def test_results_that_cannot_stand_in_one_table(load: Load, changed: dict[str, Any], text: str) -> None:
    first = small()
    other = replace(first, **{key: {**getattr(first, key), **value} for key, value in changed.items()})
    with pytest.raises(ValueError, match=text):
        load("ablation_merge").merged({"a": first, "b": other})


def test_the_static_patterns_of_an_earlier_run_are_taken(load: Load) -> None:
    static = small().settings["static"]
    window, decay = load("ablation_merge").known_choices(static, 0.125)
    assert (window.family, window.target, decay.family) == ("neighborhood", 0.125, "decay")
    assert window.masks.to_dict() == static[0]["pattern"]
    assert window.tiles.to_dict() == static[1]["pattern"]
    assert load("ablation_merge").known_choices(static, 0.3) == []


@pytest.mark.parametrize(("count", "at"), [(1, (7,)), (2, (6, 9)), (3, (5, 7, 9))])
def test_fixed_refreshes_are_spaced_evenly(load: Load, count: int, at: tuple[int, ...]) -> None:
    assert load("ablation_cases")._spaced(count, 12, 3) == at


def test_rows_by_overlap_are_foveal_and_stand_beside_fixed_refreshes(load: Load) -> None:
    module, window = load("ablation_cases"), Neighborhood(window=(3, 8, 8))
    static = [module.StaticChoice(f, t, window, window) for f in ("neighborhood", "decay") for t in (0.125, 0.25)]
    cases = module.all_cases(static, (0.125, 0.25), 12, 3)
    by_name = {case.name: case.plan for case in cases}
    for target in ("12.5%", "25.0%"):
        fixed = by_name[f"foveal, 1 refresh @ {target}"]
        for rule, name in ((Overlap(below=0.7), "0.7"), (Overlap(below=0.8, most=1), "0.8, at most 1")):
            plan = by_name[f"foveal, overlap {name} @ {target}"]
            assert (plan.residual.refresh, plan.residual.storage) == (rule, "full")
            entry = plan.to_dict()["patterns"]["pattern"]
            assert entry == {**fixed.to_dict()["patterns"]["pattern"], "refresh": rule.to_dict()}
            assert (plan.proxies, plan.dense_steps) == (fixed.proxies, 3)
        assert by_name[f"foveal, 3 refreshes @ {target}"].measure_steps(12) == dict.fromkeys(
            ("pattern", "residual"), (2, 5, 7, 9)
        )
    order = [case.name for case in cases]
    telling = ["foveal, overlap 0.8 @ 12.5%", "neighborhood + proxies @ 12.5%", "neighborhood + statistics @ 12.5%"]
    later = ["radial, dropped", "decay + residual, 1 refresh @ 25.0%", "foveal, residual in fp8 @ 12.5%"]
    assert [name for name in order if name in (*telling, *later)] == [*telling, *later]


def earlier_run(pattern: dict[str, Any], wishes: list[Any]) -> Record:
    """What a run of the command may have written."""
    kinds = ("own masks", "whole tiles and proxies")
    settings = {
        "grid": "tiny",
        "pixels": [9, 64, 64],
        "steps": 5,
        "dense_steps": 2,
        "wishes": [list(wish) for wish in wishes],
        "static": [
            {"family": family, "target": 0.125, "with": kind, "pattern": pattern}
            for family in ("neighborhood", "decay")
            for kind in kinds
        ],
        "notes": [],
        "floor": "",
        "not_run": ["neighborhood + residual @ 12.5%", "foveal @ 12.5%"],
        "failed": [],
    }
    dense = {"plan": "dense", "label": "dense", "seconds_denoise": 1.0}
    row = {
        "plan": "sparse",
        "label": "neighborhood, dropped @ 12.5%",
        "target": 0.125,
        "static": True,
        "psnr": 20.0,
        "seconds_denoise": 0.5,
        "definition": {"patterns": {"pattern": pattern}},
    }
    return Record.collect("quality", settings, [dense, row])


def test_a_run_without_what_another_has(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the command: only what the earlier run lacks is made, with its window; then one table of both."""
    module = load("ablation")
    window = Neighborhood(window=(5, 16, 16)).to_dict()  # all of the grid; no search would take it
    earlier_run(window, module.wishes(1, 1)).write(tmp_path / "a.json")
    common = "--grid tiny --prompts 1 --seeds 1 --dense-steps 2 --fewer 3 --device cpu --densities 0.125"

    def run(steps: int) -> Record:
        options = f"{common} --steps {steps} --out {tmp_path / 'b.json'} --without {tmp_path / 'a.json'}".split()
        wanted = r"^(neighborhood, dropped|neighborhood \+ residual|foveal, overlap 0.9) @ 12.5%$"
        return module.Ablation(module.parse_arguments([*options, "--only", wanted])).run()

    with pytest.raises(ValueError, match="--without: its steps is 5, wanted 6"):
        run(6)
    second = run(5)
    residual, overlap = second.rows[3:]
    assert (residual["label"], overlap["label"]) == ("neighborhood + residual @ 12.5%", "foveal, overlap 0.9 @ 12.5%")
    assert residual["definition"]["patterns"]["pattern"] == window
    assert (second.settings["without"], second.settings["failed"]) == (["a.json"], [])
    assert (len(overlap["refreshed_at"]), len(overlap["overlaps"])) == (1, 1)
    assert set(overlap["overlaps"][0]) <= {"2", "3"}
    assert 0 < overlap["overlaps"][0]["2"] < 1
    assert overlap["refreshed_at"] == [[3]] * (overlap["overlaps"][0]["2"] < 0.9) or overlap["refreshed_at"] == [[]]
    assert "refreshed_at" not in residual

    capsys.readouterr()
    arguments = ["ablation.py", "--table", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    sys.argv, kept = [*arguments, "--out", str(tmp_path / "c.json")], sys.argv
    try:
        module.main()
    finally:
        sys.argv = kept
    lines = capsys.readouterr().out
    for label in ("neighborhood, dropped @ 12.5%", residual["label"], f"{overlap['label']}: steps measured again"):
        assert label in lines
    assert labels(Record.read(tmp_path / "c.json")) == [
        "dense",
        "neighborhood, dropped @ 12.5%",
        residual["label"],
        overlap["label"],
    ]
