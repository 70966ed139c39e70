"""`visparse bench step`: the architectures are the published ones, rows are right, and what is wrong shows no time."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from visparse.adapter import find_adapter
from visparse.bench import step, step_contenders
from visparse.bench.models import ARCHITECTURES, Architecture, find_architectures
from visparse.bench.step_build import build, compiled_blocks, depth_of, make_inputs
from visparse.bench.step_command import add_step_parser
from visparse.bench.step_contenders import Contender, contenders, installed
from visparse.bench.step_rows import complete, table
from visparse.bench.step_time import depths, scale_up
from visparse.compile import compile_lists
from visparse.layout import Layout
from visparse.measure.results import Record
from visparse_kernels.attend import api

CPU = torch.device("cpu")
REAL = [name for name in ARCHITECTURES if name != "tiny"]
SMALLER = {"num_attention_heads": 2, "attention_head_dim": 32}
SMALL_PARTS = {
    "wan-14b-720p": {"ffn_dim": 32, "text_dim": 16, "freq_dim": 16, "rope_max_seq_len": 32},
    "hunyuan-video-720p": {
        "in_channels": 4,
        "out_channels": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (8, 12, 12),
    },
    "flux-1k": {
        "in_channels": 8,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (8, 12, 12),
    },
    "cogvideox-5b": {"in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 16},
}


def small(name: str) -> Architecture:
    """The same architecture, small enough for a test."""
    real = ARCHITECTURES[name]
    grid = (1, 6, 8) if real.grid[0] == 1 else (3, 4, 5)
    return replace(
        real,
        config={**real.config, **SMALLER, **SMALL_PARTS[name]},
        grid=grid,
        before=real.before and 8,
        after=real.after and 8,
        padding=real.padding and 3,
        windows=(((1, 2, 2), (1, 1, 1)),),
        radial=False,
        compensated=False,
    )


def options(**changes: Any) -> step.Options:
    return step.Options(device=CPU, dtype=torch.float32, **{"repeats": 1, "notify": lambda text: None, **changes})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that does not depend on the machine: 1 s, and 1 s for each block."""

    def seconds(run: Any, device: torch.device) -> float:
        calls: list[int] = []
        blocks = [block for kind in run.__self__.model.blocks for block in getattr(run.__self__.denoiser, kind.path)]
        hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
        run()
        for hook in hooks:
            hook.remove()
        return 1.0 + len(calls)

    monkeypatch.setattr(step, "time_once", seconds)


# ---- the architectures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokens", "heads", "head_dim", "billions"),
    [
        ("wan-14b-720p", 75_600, 40, 128, 14.29),
        ("wan-14b-480p", 32_760, 40, 128, 14.29),
        ("wan-1.3b-480p", 32_760, 12, 128, 1.42),
        ("hunyuan-video-720p", 119_056, 24, 128, 12.82),
        ("flux-1k", 4_608, 24, 128, 11.90),
        ("flux-2k", 16_896, 24, 128, 11.90),
        ("flux-4k", 66_048, 24, 128, 11.90),
        ("cogvideox-5b", 17_776, 48, 64, 5.57),
    ],
)
def test_published_sizes(name, tokens, heads, head_dim, billions):
    import diffusers

    model = ARCHITECTURES[name]
    assert (model.tokens, model.heads, model.head_dim) == (tokens, heads, head_dim)
    counts = {kind.config: kind.published for kind in model.blocks}
    with torch.device("meta"):
        denoiser = getattr(diffusers, model.model_class)(**model.config, **counts)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    adapter = find_adapter(denoiser)
    assert len(adapter.layers(denoiser)) == sum(counts.values())
    inputs = make_inputs(model, CPU, torch.bfloat16, 0)
    assert adapter.layout(denoiser.config, inputs) == Layout(model.grid, model.before, model.after)


@pytest.mark.parametrize("name", REAL)
def test_windows_visit_few_blocks(name):
    model = ARCHITECTURES[name]
    for plan in model.plans()[: len(model.windows)]:
        lists = compile_lists(
            [plan.patterns[plan.default].resolve(model.grid)],
            Layout(model.grid, model.before, model.after),
            block_q=128,
            block_k=64,
        )
        assert lists.block_density <= (0.29 if name == "flux-1k" else 0.13)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"model: unknown 'flux-1'.*'flux-[124]k'.*known: wan-14b-720p"):
        find_architectures(["flux-1"])


# ---- building and running --------------------------------------------------------------------------------------------


def test_weights_are_of_the_asked_type_but_for_what_stays_in_float32():
    denoiser = build(small("wan-14b-720p"), 2, CPU, torch.bfloat16, 0)
    assert denoiser.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert denoiser.blocks[0].norm2.weight.dtype == torch.float32
    assert denoiser.rope.freqs_cos.dtype != torch.bfloat16
    again = build(small("wan-14b-720p"), 2, CPU, torch.bfloat16, 0)
    assert torch.equal(again.blocks[1].ffn.net[2].weight, denoiser.blocks[1].ffn.net[2].weight)


def test_the_judge_is_measured_once_more_at_the_end(monkeypatch, clock):
    judge = Contender(name=step_contenders.JUDGE, kind="dense", what="", attention=_math, exact=True)
    removed = Contender(name="attention removed", kind="removed", what="", attention=lambda q, k, v, scale: v)
    monkeypatch.setattr(step, "contenders", lambda *_: [removed, judge])
    rows = step.measure(small("cogvideox-5b"), options())
    complete(rows)
    assert rows[1]["seconds_again"] == rows[1]["seconds"] == pytest.approx(43.0)
    assert "seconds_again" not in rows[0]
    assert rows[0]["ratio_to_cudnn"] == 1.0
    assert "dense cuDNN once more at the end: 43.000 s" in table(rows)


@pytest.mark.parametrize("name", SMALL_PARTS)
def test_every_family_gives_right_rows(name, clock):
    model = small(name)
    rows = step.measure(model, options())
    complete(rows)
    by_name = {row["plan"]: row for row in rows}
    assert [row["plan"] for row in rows if row["why"]] == ["dense cuDNN", "dense FA3"]
    total = 1.0 + sum(kind.published for kind in model.blocks)
    for row in rows:
        if row["why"] is None:
            assert row["seconds"] == pytest.approx(total)
            assert set(row["seconds_per_layer"].values()) == {1.0}
    assert by_name["density-1"]["relative_error"] < 1e-5
    assert by_name["density-1"]["block_density"] == 1.0
    assert by_name["density-1"]["impl"] == "cpu"
    sparse = by_name["neighborhood 1x2x2 stride 1x1x1"]
    assert sparse["relative_error"] > 0.01
    assert sparse["density"] < 0.5
    assert sparse["fallbacks"] == {}
    assert by_name["attention removed"]["relative_error"] > 0.01
    Record.collect("step", {}, rows)


def test_contenders_leave_nothing_behind():
    model = small("flux-1k")
    denoiser = build(model, 2, CPU, torch.float32, 0)
    before = [layer.processor for layer in find_adapter(denoiser).layers(denoiser).values()]
    for contender in contenders(model, CPU):
        if contender.absent is None:
            with installed(contender, denoiser, 0):
                pass
    after = [layer.processor for layer in find_adapter(denoiser).layers(denoiser).values()]
    assert all(new is old for new, old in zip(after, before, strict=True))
    with depth_of(denoiser, model, (1, 2)):
        assert [len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)] == [1, 2]
    assert [len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)] == [2, 2]


def _math(q, k, v, scale):
    """As the cuDNN contender, with a kernel that a CPU has."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["hunyuan-video-720p", "cogvideox-5b"])
def test_another_dense_kernel_gives_the_models_own_result(name, compiled):
    model = small(name)
    denoiser, inputs = build(model, 2, CPU, torch.float32, 0), make_inputs(model, CPU, torch.float32, 1)
    other = Contender(name="math", kind="dense", what="", attention=_math, exact=True)
    with torch.no_grad():
        wanted = denoiser(**inputs).sample
        with installed(other, denoiser, model.padding):
            if compiled:
                with compiled_blocks(denoiser, model, "aot_eager"):
                    found = denoiser(**inputs).sample
            else:
                found = denoiser(**inputs).sample
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        with installed(other, denoiser, model.padding - 1 if model.padding else 0):
            differs = not torch.allclose(denoiser(**inputs).sample, wanted, atol=1e-4, rtol=1e-4)
    assert differs is (model.padding > 0)


def test_flash_attention_3_is_called_as_one_operator(tmp_path, monkeypatch):
    source = (
        "import torch.nn.functional as F\n"
        "def flash_attn_func(q, k, v, softmax_scale=None):\n"
        "    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale)\n"
        "    return out.transpose(1, 2), None\n"
    )
    (tmp_path / "fa3_fwd_interface.py").write_text(source)
    step_contenders.load_fa3.cache_clear()
    assert step_contenders.load_fa3() == (None, "neither fa3_fwd_interface nor flash_attn_interface is installed")
    monkeypatch.syspath_prepend(tmp_path)
    step_contenders.load_fa3.cache_clear()
    attention, module = step_contenders.load_fa3()
    assert module == "fa3_fwd_interface"
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    wanted = _math(q, k, v, None)
    torch.testing.assert_close(attention(q, k, v, None), wanted)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, None), wanted)
    step_contenders.load_fa3.cache_clear()


# ---- what is wrong shows no time -------------------------------------------------------------------------------------


def _row(rows, name):
    return next(row for row in rows if row["plan"] == name)


def test_a_wrong_kernel_shows_no_time(monkeypatch, clock):
    right = api._CANDIDATES["cpu"].run

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out * 1.05, lse

    monkeypatch.setattr(api._CANDIDATES["cpu"], "run", wrong)
    rows = step.measure(small("wan-14b-720p"), options())
    assert _row(rows, "density-1")["why"].startswith("failed: relative error")
    assert "seconds" not in _row(rows, "density-1")
    sparse = _row(rows, "neighborhood 1x2x2 stride 1x1x1")
    assert sparse["why"] == "failed: density 1 through visparse was not right"
    assert "seconds" not in sparse
    assert "seconds" in _row(rows, "dense default")
    assert "failed: density 1" in table(rows)


def test_a_check_that_could_not_fail_shows_no_time(monkeypatch, clock):
    monkeypatch.setattr(step, "_BLIND", 1e9)
    rows = step.measure(small("wan-14b-720p"), options())
    assert _row(rows, "density-1")["why"] == "failed: attention hardly changes this output"


def test_a_check_of_which_nothing_is_known_shows_no_time(monkeypatch, clock):
    monkeypatch.setattr(step, "contenders", lambda *given: contenders(*given)[1:])
    rows = step.measure(small("wan-14b-720p"), options())
    assert _row(rows, "density-1")["why"].startswith("failed: not known whether the check can fail")


def test_a_layer_that_is_not_served_is_an_error(monkeypatch, clock):
    monkeypatch.setattr("visparse.route.LayerRoute._obstacle", lambda *_: "of a reason")
    rows = step.measure(small("wan-14b-720p"), options())
    assert "of a reason" in _row(rows, "density-1")["why"]


def test_an_exception_is_a_row(monkeypatch, clock):
    def broken(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(api._CANDIDATES["cpu"], "run", broken)
    rows = step.measure(small("wan-14b-720p"), options())
    assert _row(rows, "density-1")["why"] == "failed: RuntimeError: no such kernel"


def test_what_does_not_fit_the_budget_is_listed(monkeypatch):
    rows = step.measure(small("wan-14b-720p"), options(deadline=time.perf_counter() - 1))
    assert {row["why"] for row in rows} == {"not run: time"}
    assert len(rows) == 6

    now = [0.0]
    monkeypatch.setattr(step.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step, "time_once", lambda run, device: now.__setitem__(0, now[0] + 1.0) or run() is None or 1.0)
    rows = step.measure(small("wan-14b-720p"), options(deadline=1.5))
    assert [row["why"] for row in rows if row["why"] and "absent" not in row["why"]] == ["not run: time"] * 4


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_time_of_the_published_depth():
    flux = ARCHITECTURES["flux-1k"]
    points = depths(flux, 3)
    assert points == [(1, 1), (3, 1), (1, 3)]
    seconds = [0.5 + 0.2 * a + 0.1 * b for a, b in points]
    whole, per_block = scale_up(points, seconds, [19, 38])
    assert whole == pytest.approx(0.5 + 0.2 * 19 + 0.1 * 38)
    assert per_block == pytest.approx([0.2, 0.1])
    with pytest.raises(ValueError, match="time does not grow with depth"):
        scale_up([(1,), (3,)], [0.5, 0.4], [40])


def test_options_are_checked():
    with pytest.raises(ValueError, match="layers: wanted at least 2, got 1; time per layer"):
        options(layers=1)
    for repeats in (0, 101):
        with pytest.raises(ValueError, match=f"repeats: wanted 1 to 100, got {repeats}"):
            options(repeats=repeats)


def test_ratios_shares_and_ceilings_stay_within_a_mode():
    def row(plan: str, kind: str, seconds: float | None, mode: str = "eager", **more: Any) -> dict[str, Any]:
        return {"model": "m", "mode": mode, "plan": plan, "kind": kind, "seconds": seconds, **more}

    rows = [
        row("attention removed", "removed", 2.0),
        row("dense cuDNN", "dense", 6.0),
        row("near", "visparse", 3.0, block_density=0.125),
        row("dense default", "dense", 10.0),
        row("dense FA3", "dense", 5.0),
        row("near", "visparse", 1.0, mode="compiled", block_density=0.125),
        row("other", "visparse", None, block_density=0.125),
    ]
    complete(rows)
    near = rows[2]
    assert (near["ratio_to_cudnn"], near["ratio_to_default"]) == (2.0, pytest.approx(10 / 3))
    assert near["ratio_to_fastest_dense"] == pytest.approx(5 / 3)
    assert near["ceiling_to_cudnn"] == pytest.approx(6 / (2 + 4 / 8))
    assert near["ceiling_to_default"] == pytest.approx(10 / (2 + 8 / 8))
    assert near["ceiling"] == pytest.approx(5 / (2 + 3 / 8))
    assert rows[0]["ceiling_to_default"] == rows[0]["ratio_to_default"] == 5.0
    assert rows[3]["attention_share"] == pytest.approx(0.8)
    assert rows[5]["ratio_to_cudnn"] is None
    assert "ratio_to_cudnn" not in rows[6]


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_step_parser(parser.add_subparsers())
    arguments = parser.parse_args(["step", *words])
    return int(arguments.run(arguments))


def test_command_prints_a_table_and_writes_json(tmp_path, capsys, clock):
    file = tmp_path / "step.json"
    assert command("--device", "cpu", "--repeats", "1", "--layers", "2", "--plan", "dense", "--out", str(file)) == 0
    out = capsys.readouterr().out
    assert "tiny: grid 4x16x16, 1024 tokens, 2 heads of 32, 6 blocks" in out
    assert "absent: needs CUDA" in out
    record = Record.read(file)
    assert (record.kind, record.settings["models"], record.settings["plans"]) == ("step", ["tiny"], ["dense"])
    assert _row(record.rows, "density-1")["ratio_to_default"] == 1.0
    assert _row(record.rows, "density-1")["layers_measured"] == [[1], [2]]


def test_command_as_json_with_compiled_blocks(capsys, clock, monkeypatch):
    monkeypatch.setattr(step, "compiled_blocks", lambda denoiser, model, _: compiled_blocks(denoiser, model, "eager"))
    assert command("--device", "cpu", "--quick", "--compile", "--plan", "neighborhood", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["mode"] for row in rows] == ["eager"] * 5 + ["compiled"] * 5
    assert _row(rows[5:], "density-1")["relative_error"] < 1e-4


def test_command_fails_where_a_row_failed(monkeypatch, capsys, clock):
    monkeypatch.setattr(step, "_BLIND", 1e9)
    assert command("--device", "cpu", "--quick", "--plan", "density") == 1
