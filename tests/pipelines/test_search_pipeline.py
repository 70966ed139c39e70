"""The search on whole pipelines: weights, ranges, schedules and the probe on the one that ships; grids in tokens."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
)

import visparse
from visparse.explain import explain
from visparse.head_search.pixels import call_for, check_grid
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse_pipelines import cogvideox, hunyuan_video, tiny_video_path

CALL = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0}
GRID, STEPS = (5, 8, 8), 6
GIVEN: dict[str, Any] = {"prompts": ["a cat"], "steps": STEPS, "rows": 2, "judge": 2, "dense_steps": 2, "share": 0.9}
GIVEN |= {"probe": False, "ranges": True, "refine": 3, "weigh": 2}
TRIED = {"try_dense_steps": (1, 9), "try_refresh": (None,)}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(tiny_video_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe("a cat", num_inference_steps=STEPS, generator=generator, output_type="np", **CALL)
    return torch.as_tensor(made.frames)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of output of all runs of the pipeline, as they are made."""
    seen: list[str] = []
    call = WanPipeline.__call__

    def counted(self: Any, *args: Any, output_type: str = "np", **more: Any) -> Any:
        seen.append(output_type)
        return call(self, *args, output_type=output_type, **more)

    counted.__wrapped__ = call  # type: ignore[attr-defined]
    monkeypatch.setattr(WanPipeline, "__call__", counted)
    return seen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("search") / "work.jsonl"


@pytest.fixture(scope="module")
def found(pipe: WanPipeline, work: Any) -> SparsePlan:
    return visparse.search(pipe, speedup=1.2, grid=GRID, call={"guidance_scale": 1.0}, work=work, **GIVEN, **TRIED)


def test_the_plan_with_the_least_judged_error_is_taken(pipe: WanPipeline, found: SparsePlan, work: Any) -> None:
    measured = found.measured
    errors, rows = measured["output_errors"], measured["schedules"]
    assert list(errors)[:2] == ["foveal, by weight", "foveal, by root of weight"]
    assert measured["taken"] == min(errors, key=errors.get)
    assert {(row["dense_steps"], row["refresh"]) for row in rows} == {
        (steps, refresh) for steps in (2, 1, 9) for refresh in (0.6, None)
    }
    for row in rows:
        assert ("why_not" in row) == (row["dense_steps"] == 9)
    least = min([errors[measured["taken"]], *(row["output_error"] for row in rows if "output_error" in row)])
    dense = frames(pipe)
    with visparse.sparsify(pipe, found):
        error = (frames(pipe) - dense).square().mean().sqrt()
    assert float(error) == pytest.approx(least, rel=1e-3)
    assert found.made_for == GRID
    assert [len(row) for row in measured["weights"]] == [8, 8]  # ranges, layers
    assert all(weight >= 0 for row in measured["weights"] for weight in row)
    facts = [json.loads(line).get("facts", {}) for line in work.read_text().splitlines()]
    judged = [value[0] for fact in facts for key, value in fact.items() if key.startswith("output errors of ")]
    assert len(judged) >= 4 + len(errors)
    assert min(judged) <= least * 1.001


def test_what_was_judged_is_not_run_again(pipe: WanPipeline, found: SparsePlan, work: Any, runs: list[str]) -> None:
    again = visparse.search(pipe, speedup=1.2, call=CALL, work=work, **GIVEN, **TRIED)
    assert again.to_dict() == found.to_dict()
    assert runs == []
    other = visparse.search(pipe, attention=0.3, call=CALL, work=work, **{**GIVEN, "weigh": 0, "refine": 1})
    assert runs == ["np", "np"]  # dense once, and the plan
    assert list(other.measured["output_errors"]) == ["foveal"]
    assert "weights" not in other.measured


@pytest.mark.parametrize("judged", [0, 2])
def test_time_that_is_over_stops_judging_and_keeps_a_plan(
    pipe: WanPipeline, found: SparsePlan, work: Any, monkeypatch: pytest.MonkeyPatch, judged: int
) -> None:
    asked = []

    def clock() -> float:
        asked.append(True)
        return 0.0 if len(asked) <= judged else float("inf")

    monkeypatch.setattr("visparse.head_search.judge.time", SimpleNamespace(perf_counter=clock))
    more = {**GIVEN, "weigh": 0, "minutes": 100.0, "try_dense_steps": (1,), "ranges": True}
    plan = visparse.search(pipe, speedup=1.25, call=CALL, work=work, **more)
    errors = plan.measured["output_errors"]
    assert len(errors) == judged
    assert plan.measured["taken"] == (min(errors, key=errors.get) if judged else "foveal")
    assert [row["output_error"] for row in plan.measured["schedules"]] == [None, None]
    assert plan.dense_steps == 2
    assert {rule.steps for rule in plan.assignment} >= {":4", "4:"}


def test_ranges_are_measured_again_where_they_begin(pipe: WanPipeline, work: Any, found: SparsePlan) -> None:
    settings = {**GIVEN, "refine": 0, "weigh": 0}
    plan = visparse.search(pipe, attention=0.3, call=CALL, work=work, family="best", **settings)
    assert {rule.steps for rule in plan.assignment} >= {":4", "4:"}
    text = str(explain(plan, plan.model, Layout(GRID), STEPS))  # type: ignore[arg-type]
    lines = [line.split() for line in text.splitlines() if line.strip()[0].isdigit()]
    assert [line[0] for line in lines] == ["0", "1", "2-3", "4", "5"]
    assert ["measured" in " ".join(line) for line in lines] == [False, True, False, True, False]
    with visparse.sparsify(pipe, plan, strict=True) as handle:
        frames(pipe)
        layers = handle.report().to_dict()["models"][0]["layers"]
    served = [layer for layer in layers if layer["state"] != "dense"]
    assert served
    # a layer whose heads are all dense in a range is not served sparsely there
    wanted = [sum(plan.names(number, 4, step) is not None for step in (2, 3, 5)) for number in range(8)]
    assert [layer["sparse_calls"] for layer in layers] == wanted
    assert max(wanted) == 3
    assert all(not layer["fallbacks"] for layer in layers)


def test_a_layer_that_does_not_matter_weighs_nothing(pipe: WanPipeline) -> None:
    weights = [pipe.transformer.blocks[layer].attn1.to_out[0].weight for layer in range(2, 6)]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight, factor in zip(weights, (0.0, 0.0, 1e-3, 1e-3), strict=True):
            weight.data.mul_(factor)
        settings = {**GIVEN, "steps": 4, "ranges": False, "refine": 1, "weigh": 4}
        plan = visparse.search(pipe, attention=0.3, call=CALL, **settings)
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)
    (row,) = plan.measured["weights"]
    assert row[2] == row[3] == 0.0
    assert 0 < row[4] == row[5] < 1e-3 * min(row[0], row[6])


def test_the_probe_says_what_calls_take_here(pipe: WanPipeline, tmp_path: Any, runs: list[str]) -> None:
    work = tmp_path / "work.jsonl"
    settings = {"max_error": 0.3, "steps": STEPS, "rows": 2, "judge": 1, "dense_steps": 1, "refresh": None}
    settings |= {"prompts": ["a cat"], "call": CALL, "work": work, "candidates": ["near", "tube", "top"]}
    plan = visparse.search(pipe, **settings)
    facts: dict[str, Any] = {}
    for line in work.read_text().splitlines():
        facts |= json.loads(line).get("facts", {})
    assert set(facts["probe"]) == {"plain", "foveal"}
    assert all(call >= 0 and factor >= 0 for call, factor in facts["probe"].values())
    assert len(runs) == 2 + 4 * 2  # a look, scoring, and two plans of each family twice
    family = "foveal" if plan.residual else "plain"
    call, factor = facts["probe"][family]
    assert f"{family} {factor:.2f} of the rates and {call:.3g} ms a call" in plan.measured["rates"]
    dense = [layer for layer in range(8) if plan.names(layer, 4, 2) is None]
    for layer, (_, milliseconds) in plan.measured["layers"].items():
        if int(layer) in dense:
            assert milliseconds == pytest.approx(4 * facts["dense_milliseconds"], rel=1e-3)
        else:
            assert milliseconds >= call * 0.999
    runs.clear()
    assert visparse.search(pipe, **settings).to_dict() == plan.to_dict()
    assert runs == []
    with pytest.raises(ValueError, match="belongs to a search with probe=True, this one has False"):
        visparse.search(pipe, **settings, probe=False)


@pytest.fixture
def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_picture_model_by_its_grid(flux: Any) -> None:
    assert call_for(flux, (1, 20, 16), {}) == {"height": 160, "width": 128}  # packed: 2 x 2 latents of 4 x 4 pixels
    random = torch.Generator().manual_seed(0)
    texts = {"prompt_embeds": (1, 5, 16), "pooled_prompt_embeds": (1, 8)}
    call = {name: torch.randn(shape, generator=random) for name, shape in texts.items()}
    settings = {"steps": 4, "rows": 2, "judge": 1, "dense_steps": 1, "refresh": None, "probe": False, "refine": 2}
    plan = visparse.search(flux, density=0.6, call=call, grid=(1, 20, 16), **settings)
    assert plan.made_for == (1, 20, 16)
    assert min(plan.measured["output_errors"].values()) > 0
    with pytest.raises(ValueError, match="FluxPipeline makes pictures, wanted 1 frame, got 5; use 1xHxW"):
        visparse.search(flux, density=0.6, call=call, grid=(5, 20, 16), **settings)
    for name, value, text in (
        ("height", 160, "it says the size already, so it does not go with height; leave one out"),
        ("num_frames", 9, "it does not go with num_frames"),
    ):
        with pytest.raises(ValueError, match=text):
            call_for(flux, (1, 20, 16), {name: value})
    with pytest.raises(
        ValueError, match=r"grid: wanted \(frames, height, width\) in tokens, each at least 1, got \(1, 0"
    ):
        call_for(flux, (1, 0, 16), {})
    flux.vae.register_to_config(latent_channels=5)  # tokens no longer look packed
    with pytest.raises(
        ValueError,
        match=r"grid: wanted 1x20x16, but height=80, width=64 gave 1x10x8; leave the grid out and give .*--height",
    ):
        visparse.search(flux, density=0.6, call=call, grid=(1, 20, 16), **settings)
    flux.vae_scale_factor = None
    with pytest.raises(ValueError, match="FluxPipeline does not tell its vae_scale_factor_spatial; leave the grid out"):
        call_for(flux, (1, 20, 16), {})


def test_a_model_without_a_size(dit: Any) -> None:
    with pytest.raises(ValueError, match="DiTPipeline takes neither height nor width; leave the grid out"):
        call_for(dit, (1, 8, 8), {})


@pytest.mark.parametrize("frames_of_token", [None, 2])
def test_cogvideox_by_its_grid(frames_of_token: int | None) -> None:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, num_layers=1, text_embed_dim=8, patch_size_t=frames_of_token
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=16, layers_per_block=1, norm_num_groups=2
    )
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=None)
    found = call_for(pipe, (3, 6, 10), {"guidance_scale": 6.0})
    frames = 4 * (3 * (frames_of_token or 1) - 1) + 1
    assert found == {"guidance_scale": 6.0, "height": 96, "width": 160, "num_frames": frames}
    rows, columns, count = (found[name] for name in ("height", "width", "num_frames"))
    pipe.scheduler = SimpleNamespace(init_noise_sigma=1.0)
    noise = pipe.prepare_latents(1, 16, count, rows, columns, torch.float32, torch.device("cpu"), torch.Generator())
    arguments = {"hidden_states": noise, "encoder_hidden_states": torch.zeros(1, 2, 8)}
    assert cogvideox.layout(transformer.config, arguments).grid == (3, 6, 10)


def test_hunyuan_video_by_its_grid() -> None:
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"))
    pipe = HunyuanVideoPipeline(vae=vae, transformer=transformer, **parts)
    found = call_for(pipe, (3, 6, 10), {})
    assert found == {"height": 96, "width": 160, "num_frames": 9}
    noise = pipe.prepare_latents(
        1, 16, *(found[n] for n in ("height", "width", "num_frames")), generator=torch.Generator()
    )
    arguments = {"hidden_states": noise, "encoder_hidden_states": torch.zeros(1, 2, 8)}
    assert hunyuan_video.layout(transformer.config, arguments).grid == (3, 6, 10)


def test_a_grid_that_is_not_the_wanted_one() -> None:
    check_grid(None, (1, 2, 3), {})
    check_grid((1, 2, 3), (1, 2, 3), {})
    with pytest.raises(ValueError, match=r"wanted 1x2x3, but num_frames=5, height=32 gave 1x2x4"):
        check_grid((1, 2, 3), (1, 2, 4), {"num_frames": 5, "height": 32, "prompt": "a cat"})
