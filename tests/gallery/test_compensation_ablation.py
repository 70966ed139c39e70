"""The ablation of compensations: its plans, densities, clips, arithmetic, and one small run of the command."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visparse.measure.quality import latent_error, psnr_per_frame, ssim_per_frame
from visparse.measure.results import Record
from visparse.patterns import Neighborhood

GALLERY = Path(__file__).parents[2] / "gallery"
FOLDERS = (GALLERY / "compensation",)
CPU = torch.device("cpu")
Load = Callable[[str], ModuleType]


# ---- the rival -------------------------------------------------------------------------------------------------------


def curve(load: Load) -> list[Any]:
    point = load("ablation_curve").Point
    return [point(8, 8.0, 30.0), point(4, 4.0, 20.0), point(6, 6.0, 24.0)]  # in any order


@pytest.mark.parametrize(
    ("seconds", "psnr"), [(3.9, None), (4.0, 20.0), (5.0, 22.0), (6.0, 24.0), (7.5, 28.5), (8.0, 30.0), (11.0, 30.0)]
)
def test_psnr_at_equal_time(load: Load, seconds: float, psnr: float | None) -> None:
    assert load("ablation_curve").psnr_at(seconds, curve(load)) == pytest.approx(psnr)


@pytest.mark.parametrize(
    ("psnr", "steps"), [(19.9, None), (20.0, 4.0), (22.0, 5.0), (27.0, 7.0), (30.0, 8.0), (40.0, 8.0)]
)
def test_steps_of_equal_quality(load: Load, psnr: float, steps: float | None) -> None:
    assert load("ablation_curve").steps_for(psnr, curve(load)) == pytest.approx(steps)


def test_one_run_is_no_curve(load: Load) -> None:
    module = load("ablation_curve")
    assert module.psnr_at(5.0, curve(load)[:1]) is None
    assert module.steps_for(25.0, curve(load)[:1]) is None


@pytest.mark.parametrize(
    ("cost", "equal", "share"),
    [
        (0.25, 9.0, 1 / 3),  # saves three quarters of attention, must save a quarter of the run
        (0.5, 6.0, 1.0),  # wins only where there is nothing but attention
        (0.5, 5.0, None),  # loses even there
        (0.2, 12.0, 0.0),  # as good as the full run: any saving wins
        (1.0, 12.0, None),  # saves nothing
        (1.3, 6.0, None),
    ],
)
def test_share_from_which_a_plan_wins(load: Load, cost: float, equal: float, share: float | None) -> None:
    found = load("ablation_curve").share_from_which_it_wins(cost, equal, 12)
    assert found == pytest.approx(share)
    if found:
        assert 1 - found + found * cost == pytest.approx(equal / 12)  # both runs take equally long there


def test_verdicts_of_a_table(load: Load) -> None:
    few = [
        {"plan": "fewer-steps", "steps": n, "seconds_denoise": float(n), "psnr": 20.0 + 2 * (n - 4)} for n in (4, 6, 8)
    ]
    dense = {"plan": "dense", "steps": 12, "seconds_denoise": 12.0, "attention_seconds": 8.0}
    plan = {
        "plan": "sparse",
        "steps": 12,
        "seconds_denoise": 6.0,
        "attention_seconds": 2.0,
        "psnr": 26.0,
        "run_block_density": 0.2,
    }
    rows = [dense, *few, plan, {**plan, "psnr": 23.0}, {**plan, "seconds_denoise": 13.0}, {**plan, "psnr": 10.0}]
    *rest, good, poor, slow, bad = load("ablation_rows").judged(rows, 12)
    assert rest == [dense, *few]
    assert (good["rival_psnr"], good["beats_rival"], good["attention_cost"]) == (24.0, True, 0.25)
    assert good["equal_steps"] == 7.0
    assert good["wins_from_attention_share"] == pytest.approx((1 - 7 / 12) / 0.75)
    assert good["wins_from_attention_share_by_blocks"] == pytest.approx((1 - 7 / 12) / 0.8)
    assert poor["beats_rival"] is False
    assert (slow["beats_rival"], slow["rival_psnr"]) == (False, None)
    assert (bad["beats_rival"], bad["equal_steps"], bad["wins_from_attention_share"]) == (False, None, None)


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_no_prompt_was_trained_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = load("ablation_clips")
    monkeypatch.syspath_prepend(str(GALLERY / "training"))
    trained = {text.replace(" ,", ",") for text in importlib.import_module("data").captions()}
    sys.modules.pop("data")
    judged, calibration = clips.held_out_prompts(32), [wish.prompt for wish in clips.calibration_wishes()]
    assert len({*judged, *calibration}) == 34
    assert not trained & {*judged, *calibration}
    words = {word for text in trained for word in text.replace(",", " ").split()}
    assert all(set(text.replace(",", " ").split()) <= words for text in (*judged, *calibration))


def test_no_two_clips_share_their_noise(load: Load) -> None:
    clips = load("ablation_clips")
    wanted = [*clips.wishes(16, 2), *clips.calibration_wishes()]
    assert len(wanted) == 34
    assert len({wish.seed for wish in wanted}) == 34
    with pytest.raises(ValueError, match="prompts: wanted 1 to 32, got 33"):
        clips.wishes(33, 1)


def test_quality_is_that_of_the_library(load: Load) -> None:
    module = load("ablation_clips")
    g = torch.Generator().manual_seed(0)
    dense, made = (
        module.Clips(
            torch.randint(0, 256, (2, 3, 3, 24, 24), generator=g, dtype=torch.uint8),
            torch.randn(2, 4, 5, generator=g),
            (1.0,),
            (1.0,),
        )
        for _ in range(2)
    )
    made = replace(made, frames=(0.9 * dense.frames + 0.1 * made.frames).to(torch.uint8))
    made.frames[1] = dense.frames[1]
    found = module.quality(made, dense)
    for at in range(2):
        pair = [clips.frames[at].permute(0, 2, 3, 1) for clips in (made, dense)]
        for name, wanted in (("psnr", psnr_per_frame(*pair)), ("ssim", ssim_per_frame(*pair))):
            assert found[f"{name}_clips"][at] == pytest.approx(sum(wanted) / 3, rel=1e-6)
        assert found["latent_error_clips"][at] == pytest.approx(latent_error(made.latents[at], dense.latents[at]))
    assert found["psnr_clips"][1] == 100
    assert found["psnr"] == pytest.approx(sum(found["psnr_clips"]) / 2)
    assert found["psnr_min"] == min(found["psnr_clips"])


# ---- patterns and plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [False, True], ids=["own masks", "whole tiles"])
@pytest.mark.parametrize("target", [0.125, 0.25])
@pytest.mark.parametrize("family", ["neighborhood", "decay"])
def test_static_patterns_have_about_the_density_that_is_wanted(
    load: Load, family: str, target: float, tiled: bool
) -> None:
    module = load("ablation_static")
    found = module.candidates(family, (9, 32, 32), target, tiled=tiled, device=CPU)
    for one in found:
        assert 0.7 * target <= one.density <= 1.11 * target
        again = module.block_density(one.pattern, (9, 32, 32), tiled=tiled, device=CPU)
        assert again == one.density
    assert [one.kept for one in found] == sorted((one.kept for one in found), reverse=True)


def test_the_best_static_pattern_is_chosen_by_its_psnr(load: Load) -> None:
    module = load("ablation_static")
    found = [module.Candidate(Neighborhood(window=n), 0.1, 0.1) for n in (1, 3, 5, 7)]
    psnr = {pattern.pattern: value for pattern, value in zip(found, (20.0, 25.0, 22.0, 99.0), strict=True)}
    one, values = module.best(found, psnr.__getitem__, 3)
    assert (one, values) == (found[1], [20.0, 25.0, 22.0])
    assert module.best(found, psnr.__getitem__, 1) == (found[0], [])


def test_every_row_is_a_plan_of_its_own_that_a_run_can_follow(load: Load) -> None:
    module = load("ablation_cases")
    window = Neighborhood(window=(3, 8, 8))
    targets = (0.125, 0.25)
    static = [module.StaticChoice(f, t, window, window) for f in ("neighborhood", "decay") for t in targets]
    cases = module.all_cases(static, targets, 12, 3)
    assert len({case.name for case in cases}) == len(cases)
    by_name = {case.name: case.plan for case in cases}
    for case in cases:
        assert type(case.plan).from_dict(case.plan.to_dict()) == case.plan
        assert case.plan.check_run(12) is None
        assert case.plan.dense_steps == (4 if case.name.endswith("4 dense steps") else 3)
    foveal = by_name["foveal, 1 refresh @ 12.5%"]
    assert foveal.measure_steps(12) == {"pattern": (2, 7), "residual": (2, 7)}
    assert foveal.proxies is not None
    assert by_name["foveal @ 12.5%"].measure_steps(12) == {"pattern": (2,), "residual": (2,)}
    assert by_name["neighborhood + residual, 1 refresh @ 25.0%"].measure_steps(12) == {"residual": (2, 7)}
    assert by_name["neighborhood + statistics + residual @ 12.5%"].statistics.ramp == 0.04
    assert not by_name["neighborhood, dropped @ 12.5%"].is_compensated
    storages = {plan.residual.storage for plan in by_name.values() if plan.residual is not None}
    assert storages == {"full", *module.STORAGES}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(load_once: Load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one small run of the command wrote."""
    path = tmp_path_factory.mktemp("ablation") / "out.json"
    command = f"--grid tiny --prompts 1 --seeds 1 --steps 5 --dense-steps 2 --fewer 2,3 --device cpu --out {path}"
    rows = ["--densities", "0.125", "--only", r"^(foveal|neighborhood \+ residual) @ 12", "--limit", "2"]
    module = load_once("ablation")
    module.Ablation(module.parse_arguments([*command.split(), *rows])).run()
    return path


def test_the_file_has_every_row_and_its_figures(written: Path) -> None:
    record = Record.read(written)
    assert record.kind == "quality"
    dense, floor, *few, residual, foveal = record.rows
    assert [row["label"] for row in (dense, floor)] == ["dense", "dense again (floor)"]
    assert [row["steps"] for row in few] == [2, 3]
    assert 0 < dense["attention_share"] < 1
    assert floor["psnr"] > 50
    for row in (residual, foveal):
        assert 5 < row["psnr"] < floor["psnr"]
        assert 0 < row["ssim"] < 1
        assert row["latent_error"] > 0
        assert len(row["psnr_clips"]) == len(record.settings["wishes"]) == 1
        assert row["block_density"] < row["run_block_density"] < 1
        assert row["seconds"] > row["seconds_denoise"] > 0
        assert row["attention_cost"] > 0
        assert (row["warnings"], row["fallbacks"]) == ([], [])
        assert row["definition"]["residual"]["storage"] == "full"
    bytes_of_residuals = 8 * 1280 * 4 * 64 * 4  # layers, tokens, heads, numbers a head, bytes
    assert residual["state_bytes_per_clip"] == bytes_of_residuals
    assert foveal["state_bytes_per_clip"] > bytes_of_residuals
    assert foveal["block_density"] == pytest.approx(0.125)  # 5 of 40 tiles
    assert (record.settings["not_run"], record.settings["failed"]) == ([], [])
    assert len(record.settings["dense_seconds_at_end"]) == 1


def test_the_table_prints_from_the_file(
    load: Load, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--table", str(written)])
    load("ablation").main()
    text = capsys.readouterr().out
    lines = text.splitlines()
    psnr = {row["label"]: row.get("psnr") for row in json.loads(written.read_text())["rows"]}
    for label, value in psnr.items():
        line = next(line for line in lines if line.startswith(f"{label}  "))
        assert value is None or f"{value:.2f}" in line
    assert "attention takes" in text


def test_what_the_time_did_not_allow_and_what_failed_is_listed(load: Load) -> None:
    module = load("ablation_rows")
    told: list[tuple[list[str], list[str]]] = []

    def after(rows: list[dict], names: list[str], failed: list[str]) -> bool:
        told.append((names, list(failed)))
        return len(rows) < 2

    def fails() -> dict:
        raise RuntimeError("out of memory")

    jobs = [(name, lambda name=name: {"label": name}) for name in "abcd"]
    assert [row["label"] for row in module.run_all([jobs[0], ("x", fails), *jobs[1:]], after)] == ["a", "b"]
    failure = ["x: RuntimeError: out of memory"]
    assert told == [(["x", "b", "c", "d"], []), (["b", "c", "d"], failure), (["c", "d"], failure)]
    with pytest.raises(RuntimeError, match="out of memory"):
        module.run_all([("x", fails), *jobs], after)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "wanted --out FILE, --table FILE or both"),
        (["--out", "x", "--densities", "0.1", "12.5"], "--densities: wanted shares between 0 and 1, got [0.1, 12.5]"),
        (["--out", "x", "--steps", "5"], "--steps: wanted at least --dense-steps + 3"),
    ],
)
def test_bad_arguments(load: Load, capsys: pytest.CaptureFixture, command: list[str], text: str) -> None:
    with pytest.raises(SystemExit):
        load("ablation").parse_arguments(command)
    assert text in capsys.readouterr().err


def test_batches_need_timed_runs(load: Load) -> None:
    module = load("ablation_rows")

    class Studio:
        batch = 4

    with pytest.raises(ValueError, match=r"repeats: wanted at least 1 .* got 0; or use --batch 1"):
        module.Runner(Studio(), [], 12, 0)
