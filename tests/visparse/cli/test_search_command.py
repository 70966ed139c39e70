"""`visparse search` end to end on a tiny random pipeline."""

import json
import subprocess
import sys

import pytest
import torch

import visparse
from visparse.cli import main
from visparse.measure.generate import load_pipeline
from visparse.plan import SparsePlan

SIZE = ["--height", "32", "--width", "48", "--frames", "5", "--guidance", "3", "--steps", "6", "--judge", "2"]
SHAPE = {"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 3.0}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n", encoding="utf-8")
    return str(path)


def test_the_file_is_a_plan_that_runs(tiny_folder, tmp_path, prompts, capsys):
    out = tmp_path / "found" / "plan.json"
    given = ["search", "--model", str(tiny_folder), "--prompts", prompts, "--out", str(out), "--device", "cpu", *SIZE]
    assert main([*given, "--density", "0.6"]) == 0
    printed = capsys.readouterr().out
    assert f"written to {out}" in printed
    plan = SparsePlan.from_pretrained(out)
    assert plan.model.layers == 2
    assert plan.made_for == (2, 4, 6)
    assert plan.measured["calibration"]["runs"] == 2
    assert 0 < plan.measured["predicted"]["error"] < 0.9
    assert plan.measured["predicted"]["block_density"] <= 0.6
    assert plan.measured["device"]["type"] == "cpu"
    lines = [json.loads(line) for line in (tmp_path / "found" / "plan.json.work.jsonl").read_text().splitlines()]
    # 2 prompts, 2 steps, 2 branches, 2 layers
    assert sum("key" in line for line in lines) == 16
    assert {line["key"][2] for line in lines if "key" in line} == {"transformer:cond", "transformer:uncond"}

    before = out.read_bytes()
    assert main([*given, "--density", "0.6"]) == 0
    assert out.read_bytes() == before
    assert main([*given, "--density", "0.6", "--seed", "1"]) == 1
    assert "it belongs to a search with seed=0, this one has 1" in capsys.readouterr().err
    assert out.read_bytes() == before

    pipe, _ = load_pipeline(tiny_folder, device="cpu")
    with visparse.sparsify(pipe, str(out), strict=True) as handle:
        pipe("a bird", num_inference_steps=6, output_type="latent", generator=torch.Generator().manual_seed(0), **SHAPE)
        assert handle.report().to_dict()


def test_refining_takes_the_best_output(tiny_folder, tmp_path, prompts, capsys):
    out = tmp_path / "plan.json"
    given = ["search", "--model", str(tiny_folder), "--prompts", prompts, "--out", str(out), "--device", "cpu", *SIZE]
    assert main([*given, "--density", "0.6", "--refine", "3"]) == 0
    measured = SparsePlan.from_pretrained(out).measured
    errors = measured["output_errors"]
    assert set(errors) == {"foveal", "plain"}  # by content alone is too dear on a grid of one tile
    assert measured["taken"] == min(errors, key=errors.get)
    before = out.read_bytes()
    assert main([*given, "--density", "0.6", "--refine", "3"]) == 0
    assert out.read_bytes() == before
    capsys.readouterr()
    assert main([*given, "--max-error", "0.6", "--refine", "3"]) == 1
    assert "refine: wanted a goal of time or blocks" in capsys.readouterr().err


def test_two_processes_find_what_one_finds(tiny_folder, tmp_path, prompts):
    given = ["search", "--model", str(tiny_folder), "--prompts", prompts, "--device", "cpu", *SIZE, "--density", "0.6"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541"]
    subprocess.run(
        [*launch, "-m", "visparse.cli", *given, "--out", str(tmp_path / "two.json")], check=True, capture_output=True
    )
    assert main([*given, "--out", str(tmp_path / "one.json")]) == 0
    two, one = (SparsePlan.from_pretrained(tmp_path / f"{name}.json") for name in ("two", "one"))
    assert two.assignment == one.assignment
    assert two.measured["layers"] == one.measured["layers"]
    works = [path.read_text().count('"key"') for path in sorted(tmp_path.glob("two.json.work.jsonl.*"))]
    assert works == [8, 8]


def test_a_grid_ranges_and_schedules(tiny_folder, tmp_path, prompts, capsys):
    out = tmp_path / "plan.json"
    (tmp_path / "one.txt").write_text("a cat\n", encoding="utf-8")
    given = ["search", "--model", str(tiny_folder), "--prompts", str(tmp_path / "one.txt"), "--out", str(out)]
    given += ["--device", "cpu", "--grid", "2x4x6", "--guidance", "1", "--steps", "6", "--judge", "3", "--share", "0.9"]
    given += ["--speedup", "1.1", "--dense-steps", "2", "--ranges", "--per-tile", "4", "--no-probe", "--refine", "4"]
    given += ["--weigh", "2", "--try-dense-steps", "1,6", "--try-refresh", "none,2"]
    assert main(given) == 0
    plan = SparsePlan.from_pretrained(out)
    assert plan.made_for == (2, 4, 6)
    assert {(row["dense_steps"], row["refresh"]) for row in plan.measured["schedules"]} >= {(2, 0.6), (1, None), (6, 2)}
    assert [len(row) for row in plan.measured["weights"]] == [2, 2]
    assert "brought to this model" not in plan.measured["rates"]
    assert plan.proxies is None or plan.proxies.per_tile == 4
    header = json.loads((tmp_path / "plan.json.work.jsonl").read_text().splitlines()[0])["settings"]
    assert (header["per_tile"], header["probe"]) == (4, False)
    assert header["call"] == {"guidance_scale": "1.0", "height": "32", "num_frames": "5", "width": "48"}
    capsys.readouterr()
    assert main(["plan", "show", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())  # columns are as wide as their numbers
    for part in ("schedules that were tried", "no step of 6 would be sparse with 6", "layer range 1 range 2", "█"):
        assert part in text
    assert main(["plan", "check", str(out), "--model", str(tiny_folder), "--steps", "6"]) == 0
    assert main(["plan", "check", str(out), "--model", str(tiny_folder), "--steps", "6", "--grid", "4,8,12"]) == 0
    assert "ok     grid 4x8x12" in capsys.readouterr().out

    before = out.read_bytes()
    # the same calibration in pixels goes on with the same work file
    at = given.index("--grid")
    pixels = [*given[:at], "--height", "32", "--width", "48", "--frames", "5", *given[at + 2 :]]
    assert main(pixels) == 0
    assert out.read_bytes() == before
    assert main([*given[:at], *given[at + 2 :], "--grid", "2x4x8", "--work", str(tmp_path / "w"), "--dry-run"]) == 0
    assert "grid 2x4x8 = 64 tokens" in capsys.readouterr().out


def test_the_family_for_models_without_steps(tiny_folder, tmp_path, prompts, capsys):
    given = ["search", "--model", str(tiny_folder), "--prompts", prompts, "--out", str(tmp_path / "p.json")]
    given += ["--device", "cpu", *SIZE, "--density", "0.6"]
    assert main([*given, "--family", "pooled", "--dense-steps", "0", "--candidates", "near,pooled", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "pooled  pooled8" in text
    assert "foveal  " not in text
    assert main([*given, "--family", "foveal", "--dense-steps", "0"]) == 1
    assert "use family='pooled', which reuses nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--grid", "2x4"], "argument --grid: wanted frames, height and width such as 9x32x32, got '2x4'"),
        (["--grid", "2x4x6", "--width", "48"], "argument --grid: it does not go with --width: leave one out"),
        (
            ["--try-refresh", "none,x"],
            "argument --try-refresh: wanted a number of steps or a share such as 0.25, got 'x'",
        ),
        (["--try-dense-steps", "two"], "argument --try-dense-steps: wanted a number of steps or a share"),
        (["--per-tile", "0"], "argument --per-tile: wanted a whole number of at least 1, got '0'"),
        (["--model", "timm:test_vit", "--grid", "1x6x8"], "it does not go with pictures: give --height and --width"),
    ],
)
def test_options_that_are_refused(more, text, capsys):
    with pytest.raises(SystemExit):
        main(["search", "--model", "folder", "--attention", "0.5", *more])
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--attention", "0.5", "--weigh", "2"], "weigh: it is judged by the model's output, which needs refine"),
        (["--attention", "0.5", "--weigh", "-1"], "weigh: wanted an int of at least 0, got -1; 4 is usual"),
        (
            ["--attention", "0.5", "--refine", "2", "--try-refresh", "none"],
            "try_refresh: schedules are compared at one",
        ),
        (["--attention", "0.5", "--per-tile", "3"], "per_tile: "),
        (["--attention", "0.5", "--grid", "0x4x6"], "grid: wanted (frames, height, width) in tokens, each at least 1"),
    ],
)
def test_settings_that_are_refused(tiny_folder, tmp_path, prompts, more, text, capsys):
    given = ["search", "--model", str(tiny_folder), "--out", str(tmp_path / "plan.json"), "--device", "cpu"]
    assert main([*given, "--prompts", prompts, "--steps", "6", *more]) == 1
    assert text in capsys.readouterr().err


def test_dry_run_prints_candidates_and_time(tiny_folder, tmp_path, prompts, capsys):
    out = tmp_path / "plan.json"
    given = ["search", "--model", str(tiny_folder), "--prompts", prompts, "--out", str(out), "--device", "cpu", *SIZE]
    assert main([*given, "--attention", "0.9", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in (
        "grid 2x4x6 = 48 tokens",
        "foveal  top8",
        "plain   skip",
        "left out:",
        "2 runs of 6 steps",
        "s in all",
    ):
        assert part in text
    assert main([*given, "--attention", "0.9", "--dry-run", "--json", "--candidates", "near,top8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in found["candidates"]} == {"dense", "skip", "near8", "near4", "near2", "top8"}
    assert found["seconds"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "prompts.txt"]


def test_bad_input(tiny_folder, tmp_path, prompts, capsys):
    given = ["search", "--model", str(tiny_folder), "--out", str(tmp_path / "plan.json"), "--device", "cpu", *SIZE]
    assert main([*given, "--prompts", str(tmp_path / "none.txt"), "--attention", "0.5"]) == 1
    assert "prompts: no file" in capsys.readouterr().err
    assert main([*given, "--prompts", prompts]) == 1
    assert "goal: wanted exactly one of speedup, attention, density, max_error, got none" in capsys.readouterr().err
    assert main([*given, "--prompts", prompts, "--speedup", "30"]) == 1
    error = capsys.readouterr().err
    assert "speedup: 30.0 is beyond the ceiling" in error
    assert "times with none" in error
    with pytest.raises(SystemExit):
        main([*given, "--attention", "0.5"])
    assert "the model has no demo with a prompt" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
