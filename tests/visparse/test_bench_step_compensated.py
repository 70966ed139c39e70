"""`visparse bench step` with compensations: what is timed are the steps that it says, and what it judges them by."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visparse.bench import step, step_compensated, step_runs
from visparse.bench.models import ARCHITECTURES, Architecture
from visparse.bench.step_build import build, compiled_blocks, make_inputs
from visparse.bench.step_command import add_step_parser
from visparse.bench.step_contenders import Contender, check_names, contenders, installed
from visparse.bench.step_rows import complete, table
from visparse.bench.step_runs import Calls, Forwards, calls_of, demand_calls
from visparse.compensation import Proxies
from visparse.compensation.residual_groups import count_groups
from visparse.compensation.residual_sizes import storage_bytes
from visparse.compensation.serve import Compensation
from visparse.layout import Layout
from visparse.plan import SparsePlan

CPU = torch.device("cpu")
TINY = replace(ARCHITECTURES["tiny"], grid=(2, 16, 16), windows=(((1, 4, 4), (1, 4, 4)),), radial=False)
TOP_K = "top-k 12.5 %"
COMPENSATED = [
    TOP_K,
    f"{TOP_K} + proxies",
    "foveal",
    f"{TOP_K} + proxies + fp8 residual",
    f"pooled {TOP_K}",
    f"pooled {TOP_K} + proxies",
    "neighborhood 1x4x4 stride 1x4x4 + proxies",
]
MEASURING = COMPENSATED[:4]


def options(**changes: Any) -> step.Options:
    return step.Options(
        device=CPU, dtype=torch.float32, **{"repeats": 2, "layers": 2, "notify": lambda text: None, **changes}
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that does not depend on the machine: 1 s, 1 s for each block, and 1 s more where the layer measured."""
    measured: list[int] = []
    measure = Compensation._measure

    def counted(*arguments: Any) -> Any:
        measured.append(1)
        return measure(*arguments)

    def seconds(run: Any, device: torch.device) -> float:
        calls: list[int] = []
        hooks = [
            block.register_forward_hook(lambda *_: calls.append(1))
            for kind in run.__self__.model.blocks
            for block in getattr(run.__self__.denoiser, kind.path)
        ]
        measured.clear()
        run()
        for hook in hooks:
            hook.remove()
        return 1.0 + len(calls) + len(measured)

    monkeypatch.setattr(Compensation, "_measure", counted)
    monkeypatch.setattr(step, "time_once", seconds)


def _row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["plan"] == name)


# ---- which contenders ------------------------------------------------------------------------------------------------


def names_of(model: Architecture, *names: str) -> list[str]:
    return [one.name for one in contenders(model, CPU, names)]


def test_contenders_with_compensations_come_last_and_where_the_model_says_so():
    plain = names_of(replace(TINY, compensated=False))
    assert names_of(TINY) == [*plain, *COMPENSATED]
    assert not set(plain) & set(COMPENSATED)
    assert [name for name, model in ARCHITECTURES.items() if model.compensated] == ["wan-14b-720p", "tiny"]


def test_plans_by_name_come_with_what_they_are_judged_by():
    judges = ["attention removed", "density-1"]
    assert names_of(TINY, "foveal") == [*judges, "dense default", TOP_K, "foveal"]
    assert names_of(replace(TINY, compensated=False), "foveal", "pooled") == [
        *judges,
        "dense default",
        TOP_K,
        "foveal",
        *COMPENSATED[4:6],
    ]
    near = COMPENSATED[-1].removesuffix(" + proxies")
    assert names_of(TINY, "4x4 + prox") == [*judges, near, "dense default", near + " + proxies"]
    assert names_of(TINY, "no such") == []


def test_on_a_gpu_cudnn_is_the_judge_and_large_residuals_are_absent(monkeypatch):
    device, model = torch.device("cuda"), ARCHITECTURES["wan-14b-720p"]
    for memory, text in [(139 * 2**30, None), (40 * 2**30, "residuals of 28.8 GiB, 20.0 GiB (50% of the device)")]:
        found = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(step_compensated.torch.cuda, "get_device_properties", lambda device, found=found: found)
        of = {one.name: one for one in contenders(model, device, ["residual"])}
        assert list(of) == ["attention removed", "dense cuDNN", "density-1", TOP_K, MEASURING[3]]
        absent = of[MEASURING[3]].absent
        assert absent is None if text is None else absent is not None and absent.startswith(text)


def test_a_name_that_no_contender_has():
    check_names(["foveal", "radial"], [TINY, ARCHITECTURES["wan-14b-720p"]], CPU)
    with pytest.raises(
        ValueError, match=r"plan: no contender has 'fovael' in its name \(names: .*dense default.*foveal"
    ):
        check_names(["foveal", "fovael"], [TINY], CPU)
    assert step.measure(TINY, options(plans=("fovael",))) == []


# ---- steps of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usual", [torch.full((1,), 500), torch.full((1,), 500.0, dtype=torch.bfloat16), torch.tensor([0.5]).bfloat16()]
)
def test_timesteps_fall_and_rise_in_every_type(usual):
    seen: list[float] = []

    def denoiser(timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert timestep.dtype == usual.dtype
        seen.append(float(timestep))
        return (timestep,)

    run = Forwards(TINY, denoiser, {"timestep": usual}, lambda: None)
    run.forward()
    run.forward()
    run.moment = 0
    for _ in range(step_runs.MOST_STEPS + 3):
        run.forward()
    falling = seen[2:]
    assert seen[:3] == [float(usual)] * 3
    assert all(now < before for before, now in pairwise(falling))
    assert falling[-1] > 0
    seen.clear()
    for moment in range(step_runs.MOST_STEPS):
        run.moment = -moment
        run.forward()
    assert all(now > before for before, now in pairwise(seen))


def test_calls_are_counted():
    denoiser = build(TINY, 2, CPU, torch.float32, 0)
    run = Forwards(TINY, denoiser, make_inputs(TINY, CPU, torch.float32, 1), lambda: None)
    foveal = next(one for one in contenders(TINY, CPU) if one.name == "foveal")
    with installed(foveal, denoiser, 0) as handle:
        assert handle is not None
        run.moment = 0
        run.forward()
        assert calls_of(handle) == Calls(sparse=0, measured=2, dense=0)
        demand_calls(handle, Calls(0, 0, 0), measured=2)
        run.forward()
        demand_calls(handle, Calls(0, 2, 0), sparse=2)
        with pytest.raises(
            RuntimeError, match=r"wanted Calls\(sparse=4, .*counted Calls\(sparse=2, measured=0, dense=0"
        ):
            demand_calls(handle, Calls(0, 2, 0), sparse=4)
        run.moment = -1
        run.forward()
        assert calls_of(handle) == Calls(sparse=0, measured=2, dense=0)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_plans_with_compensations(clock):
    rows = step.measure(TINY, options())
    complete(rows)
    assert [row["plan"] for row in rows if row["why"]] == ["dense cuDNN", "dense FA3"]
    for name in COMPENSATED:
        row = _row(rows, name)
        assert row["seconds"] == pytest.approx(7.0)
        assert (row["fallbacks"], row["impl"], row["repeats"]) == ({}, "cpu", 2)
        assert row["block_density"] <= 0.5
        assert row["relative_error"] > 0.01
        assert ("measured_seconds" in row) is (name in MEASURING)
        assert ("added" in row) is (name not in (TOP_K, f"pooled {TOP_K}"))
    for row in (_row(rows, name) for name in MEASURING):
        assert row["measured_error"] < 1e-5
        assert row["measured_seconds"] == pytest.approx(13.0)  # 1, 6 blocks, 6 layers that measured
        assert row["measured_seconds_measured"] == [3.0, 5.0]
        assert row["state_bytes"] == 6 * row["state_bytes_measured"][0] == 3 * row["state_bytes_measured"][1]
    size = {"tokens": TINY.tokens, "heads": TINY.heads, "head_dim": TINY.head_dim}
    residuals = [_row(rows, name)["state_bytes"] - _row(rows, MEASURING[1])["state_bytes"] for name in MEASURING[2:]]
    groups = count_groups(Layout(TINY.grid), (2, 2, 2))
    assert residuals == [
        6 * storage_bytes("average-fp8", groups=groups, **size),
        6 * storage_bytes("fp8", **size),
    ]
    assert [_row(rows, name)["added"] for name in MEASURING[1:]] == [1.0] * 3
    text = table(rows)
    assert f"foveal: 1.000x the step of {TOP_K}, a step that measures takes 13.000 s, " in text
    assert f"pooled {TOP_K} + proxies: 1.000x the step of pooled {TOP_K}\n" in text
    assert "MiB are kept for each branch" in text


@pytest.mark.parametrize("name", ["flux-1k", "hunyuan-video-720p", "cogvideox-5b"])
def test_families_with_text(name, clock):
    real = ARCHITECTURES[name]
    parts = {
        "flux-1k": {"in_channels": 8, "joint_attention_dim": 16, "axes_dims_rope": (8, 12, 12)},
        "hunyuan-video-720p": {"num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (8, 12, 12)},
        "cogvideox-5b": {"time_embed_dim": 16, "text_embed_dim": 16},
    }
    config = {**real.config, "num_attention_heads": 2, "attention_head_dim": 32, **parts[name]}
    model = replace(
        real,
        config=config,
        grid=(1, 16, 32) if real.grid[0] == 1 else (2, 16, 16),
        before=real.before and 8,
        after=real.after and 8,
        padding=real.padding and 3,
        windows=(),
        radial=False,
    )
    rows = step.measure(model, options(plans=("foveal",)))
    total = 1.0 + sum(kind.published for kind in model.blocks)
    for plan in (TOP_K, "foveal"):
        row = _row(rows, plan)
        assert row["why"] is None
        assert row["seconds"] == pytest.approx(total)
        assert row["measured_seconds"] == pytest.approx(2 * total - 1)
        assert row["measured_error"] < 1e-5


def test_compiled_blocks_run_the_same_steps(monkeypatch, clock):
    monkeypatch.setattr(step, "compiled_blocks", lambda denoiser, model, _: compiled_blocks(denoiser, model, "eager"))
    rows = step.measure(TINY, options(plans=("foveal", "pooled"), compiled=True))
    half = len(rows) // 2
    for eager, compiled in zip(rows[:half], rows[half:], strict=True):
        assert (eager["plan"], compiled["mode"], compiled["why"]) == (compiled["plan"], "compiled", None)
        assert compiled["relative_error"] == pytest.approx(eager["relative_error"], abs=1e-4)
        assert compiled.get("state_bytes") == eager.get("state_bytes")


# ---- what is wrong shows no time -------------------------------------------------------------------------------------


def _measured(monkeypatch: pytest.MonkeyPatch, plan: SparsePlan) -> dict[str, Any]:
    bad = Contender(name="bad", kind="visparse", what="", plan=plan)
    monkeypatch.setattr(step, "contenders", lambda *given: [*contenders(*given), bad])
    return _row(step.measure(TINY, options(plans=("density",))), "bad")


def test_a_plan_that_measures_at_every_step_shows_no_time(monkeypatch, clock):
    pattern = {"name": "top_k", "share": 0.125, "refresh": 1}
    plan = SparsePlan(name="bad", patterns={"a": pattern}, default="a", dense_steps=1, proxies=Proxies())
    row = _measured(monkeypatch, plan)
    assert "not the steps that were to be timed: wanted Calls(sparse=2, measured=0, dense=0)" in row["why"]
    assert "seconds" not in row


def test_a_compensated_plan_with_dense_steps_shows_no_time(monkeypatch, clock):
    plan = SparsePlan(
        name="bad", patterns={"a": {"name": "top_k", "score": "mass"}}, default="a", dense_steps=4, proxies=Proxies()
    )
    row = _measured(monkeypatch, plan)
    assert "not the steps that were to be timed: wanted Calls(sparse=0, measured=1, dense=0)" in row["why"]
    assert "seconds" not in row


def test_timesteps_that_do_not_fall_show_no_time(monkeypatch, clock):
    monkeypatch.setattr(step_runs, "_FALL", 65 / 64)
    row = _row(step.measure(TINY, options(plans=("foveal",))), "foveal")
    assert "not the steps that were to be timed" in row["why"]
    assert "seconds" not in row


def test_a_measuring_step_that_is_not_dense_shows_no_time(monkeypatch, clock):
    measure = Compensation._measure
    monkeypatch.setattr(Compensation, "_measure", lambda *arguments: measure(*arguments) * 1.05)
    row = _row(step.measure(TINY, options(plans=("foveal",))), "foveal")
    assert row["why"].startswith("failed: relative error")
    assert row["measured_error"] > 1e-3
    assert "seconds" not in row


def test_without_an_exact_density_1_there_is_no_time(monkeypatch, clock):
    monkeypatch.setattr(step, "contenders", lambda *given: [c for c in contenders(*given) if c.name != "density-1"])
    row = _row(step.measure(TINY, options(plans=("foveal",))), "foveal")
    assert row["why"] == "failed: density 1 through visparse was not right"
    assert "seconds" not in row


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_step_parser(parser.add_subparsers())
    arguments = parser.parse_args(["step", *words])
    return int(arguments.run(arguments))


def test_command_runs_plans_by_name(capsys, clock):
    assert command("--device", "cpu", "--layers", "2", "--repeats", "1", "--plan", "foveal", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["plans"] == ["foveal"]
    assert [row["plan"] for row in record["rows"]] == [
        "attention removed",
        "density-1",
        "dense default",
        TOP_K,
        "foveal",
    ]
    assert _row(record["rows"], "foveal")["measured_seconds"] == 13.0


def test_command_refuses_unknown_plans():
    with pytest.raises(ValueError, match="plan: no contender has 'no such' in its name"):
        command("--device", "cpu", "--plan", "no such")
