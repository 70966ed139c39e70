"""What compensated plans keep during runs of real pipelines, and that nothing of it is ever used where it is stale."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.testing import CompileCounterWithBackend

import visparse
from visparse.compensation.serve import Compensation

BLOCKS = {"block_q": 64, "block_k": 32, "strict": True}
SIZE = {"height": 128, "num_inference_steps": 6}  # a grid of 4 x 8 x 6: 3 tiles of queries, 6 of keys
NEAR = {"window": (2, 3, 3), "stride": 1, "dense_steps": 2, "statistics": {"refresh": 2}, "residual": {"refresh": 3}}
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "foveal": ("foveal", {}),
    "re-ttention": ("re-ttention", {}),
    "neighborhood": ("neighborhood", NEAR),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def sparse(target: Any, plan: str = "foveal", **changes: Any) -> Any:
    name, settings = PLANS[plan]
    return visparse.sparsify(target, name, **{**settings, **BLOCKS, **changes})


def serving(pipe: Any) -> Compensation:
    found: Compensation = pipe.transformer._visparse.router.compensation
    return found


def layers(target: Any) -> Any:
    return visparse.report(target).models[0].layers


def untouched(model: Any) -> bool:
    return all(type(block.attn1.processor) is WanAttnProcessor for block in model.blocks) and not hasattr(
        model, "_visparse"
    )


def at_step(step: int, do: Callable[[Any], object]) -> Callable[..., dict[str, Any]]:
    """A callback of pipelines."""

    def call(pipe: Any, now: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if now == step:
            do(pipe)
        return {}

    return call


def stop(pipe: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def movie(film: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda pipe, **settings: film(pipe, **{**SIZE, **settings})


@pytest.fixture
def fresh(make_wan: Callable[..., Any], movie: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The result of a pipeline that has never run before."""

    def run(plan: str = "foveal", **settings: Any) -> torch.Tensor:
        pipe = make_wan()
        sparse(pipe, plan)
        return movie(pipe, **settings)

    return run


@pytest.fixture
def reuses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Checks each use of what was measured: (step of the measurement, step of the use) of each.

    It must be of the same run, of the step that the plan wants or a later one, and not of a step before a refresh.
    """
    measured: dict[tuple[int, str], tuple[int, int]] = {}
    used: list[tuple[int, int]] = []
    measure, reuse = Compensation._measure, Compensation._sparse

    def measuring(self: Compensation, call: Any, layout: Any, names: Any, patterns: Any, state: Any, *rest: Any) -> Any:
        before = dict(state.measured)
        out = measure(self, call, layout, names, patterns, state, *rest)
        for what, wanted in state.measured.items():
            if before.get(what) != wanted:
                measured[id(state), what] = self.router.clock.runs, self.router.clock.step or 0
        return out

    def reusing(self: Compensation, call: Any, layout: Any, names: Any, patterns: Any, state: Any, step: int) -> Any:
        plan, clock = self.router.plan, self.router.clock
        assert set(state.measured) == set(plan.refreshes)
        for what, wanted in state.measured.items():
            assert wanted == plan.measured_at(what, step, clock.total, clock.sigmas)
            run, when = measured[id(state), what]
            assert run == clock.runs
            assert wanted <= when < step or (wanted <= when and clock.scheduler.timesteps().steps.count(step) > 1)
            used.append((when, step))
        return reuse(self, call, layout, names, patterns, state, step)

    monkeypatch.setattr(Compensation, "_measure", measuring)
    monkeypatch.setattr(Compensation, "_sparse", reusing)
    return used


# ---- memory ----------------------------------------------------------------------------------------------------------


def tensors() -> tuple[int, int]:
    """Number and bytes of all tensors that are alive."""
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return len(alive), sum(x.nbytes for x in alive)


@every_plan
def test_fifty_runs_leave_no_memory(wan, movie, plan):
    sparse(wan, plan)
    seen: list[Any] = []

    def look(pipe: Any) -> None:
        seen.append(
            (visparse.report(pipe).models[0].state_bytes, weakref.ref(next(iter(serving(pipe).states.values()))))
        )

    settings: dict[str, Any] = {"guidance": 3.0, "num_inference_steps": 5, "height": 64}
    movie(wan, **settings, callback_on_step_end=at_step(2, look))
    assert seen[0][0] > 0
    before = tensors()
    for _ in range(49):
        movie(wan, **settings)
    assert tensors() == before
    assert seen[0][1]() is None
    assert visparse.report(wan).models[0].state_bytes == 0
    visparse.restore(wan)
    assert tensors()[1] < before[1]


@pytest.mark.parametrize("schedule", [{"last": 1}, {"every": 3}, {}], ids=str)
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_states_are_freed_with_the_last_call(wan, movie, monkeypatch, kind, schedule):
    """Not only when the pipeline ends, since its decoder comes before that."""
    wan.scheduler = kind()
    sparse(wan, dense_steps={"first": 2} | schedule)
    monkeypatch.setattr(Compensation, "rest", lambda self, step: None)
    movie(wan, guidance=3.0)
    assert not serving(wan).states


def test_restore_in_a_run_frees_at_once(wan, movie):
    sparse(wan)
    states: list[Any] = []

    def restore(pipe: Any) -> None:
        states.extend(weakref.ref(state) for state in serving(pipe).states.values())
        visparse.restore(pipe)
        gc.collect()
        states.append(sum(state() is not None for state in states))

    assert movie(wan, callback_on_step_end=at_step(2, restore)).isfinite().all()
    assert len(states) == 4
    assert states[-1] == 0


def test_many_sizes_leave_no_memory(wan, movie):
    sparse(wan)
    for frames in range(4, 16):
        movie(wan, height=64, width=32, num_frames=1 + 4 * (frames - 1), num_inference_steps=2)
    kept = serving(wan)
    assert not kept.states
    assert len(kept._checked) <= 8


def test_a_model_without_steps_keeps_nothing(wan_transformer):
    settings = {"keep": 0.3, "score": "pooled", "refresh": None, "residual": None, "dense_steps": 0}
    visparse.sparsify(wan_transformer, "foveal", **settings, **BLOCKS)
    with torch.no_grad():
        for _ in range(3):
            wan_transformer(torch.randn(1, 16, 4, 16, 12), torch.tensor([900]), torch.randn(1, 4, 32))
    assert not wan_transformer._visparse.router.compensation.states
    assert visparse.report(wan_transformer).models[0].layers[0].sparse_calls == 3


def test_going_over_to_the_other_transformer_frees_the_first(make_wan, wan_transformer, movie):
    pipe = make_wan(transformer_2=wan_transformer, boundary_ratio=0.6)
    sparse(pipe)
    held: list[tuple[int, int]] = []

    def count(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        sessions = [model._visparse.router for model in (pipe.transformer, pipe.transformer_2)]
        held.append(tuple(len(router.compensation.states) for router in sessions))
        return {}

    first = movie(pipe, num_inference_steps=10, callback_on_step_end=count)
    assert (3, 0) in held
    assert (0, 3) in held
    assert (3, 3) not in held[-2:]
    assert held[-1] == (0, 0)
    assert torch.equal(movie(pipe, num_inference_steps=10), first)


# ---- runs of all kinds -----------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_run_after_one_that_was_stopped_is_as_a_first_one(wan, movie, fresh, plan, step):
    sparse(wan, plan)
    with pytest.raises(KeyboardInterrupt):
        movie(wan, guidance=3.0, height=64, callback_on_step_end=at_step(step, stop))
    with pytest.raises(KeyboardInterrupt):
        movie(wan, callback_on_step_end=at_step(step, stop))
    assert torch.equal(movie(wan), fresh(plan))
    movie(wan, callback_on_step_end=at_step(step, lambda pipe: setattr(pipe, "_interrupt", True)))
    assert not serving(wan).states
    assert torch.equal(movie(wan), fresh(plan))


@every_plan
def test_sizes_batches_and_guidance_change_between_runs(wan, movie, fresh, plan, reuses):
    sparse(wan, plan)
    runs: list[dict[str, Any]] = [
        {},
        {"height": 64, "num_frames": 17},
        {"num_videos_per_prompt": 2},
        {"guidance": 3.0},
        {"batch": 2, "guidance": 3.0},
        {"num_inference_steps": 9},
        {},
    ]
    for settings in runs:
        assert torch.equal(movie(wan, **settings), fresh(plan, **settings)), settings
    assert reuses


def cogvideox() -> Any:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    ).eval()


def test_one_call_for_both_branches_is_two_calls(reuses):
    """A bare transformer, called by hand with falling timesteps: guidance in one batch of two, and in two passes."""

    def denoise(model: Any, rows: list[slice]) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        latents, text = torch.randn(2, 3, 4, 16, 16, generator=random), torch.randn(2, 6, 16, generator=random)
        rotary = get_3d_rotary_pos_embed(32, ((0, 0), (8, 8)), (8, 8), 3)
        outs = []
        with torch.no_grad():
            for t in (900, 800, 600, 400, 200):
                parts = [
                    model(latents[row], text[row], torch.tensor([t]).expand(len(text[row])), image_rotary_emb=rotary)
                    for row in rows
                ]
                outs.append(torch.cat([part.sample for part in parts]))
                latents = latents - 0.2 * outs[-1]
        return torch.stack(outs)

    results = []
    for rows in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = cogvideox()
        dense = denoise(model, rows)
        sparse(model, dense_steps=1, refresh=2, residual={"refresh": 2, "storage": "full"})
        results.append(denoise(model, rows))
        torch.testing.assert_close(results[-1][[0, 2, 4]][0], dense[0], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(results[-1][1], dense[1], atol=1e-4)
        counts = [(x.sparse_calls, x.measured_calls) for x in layers(model)]
        assert counts == [(2 * len(rows), 3 * len(rows))] * 2
        assert torch.equal(denoise(model, rows), results[-1])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


@every_plan
def test_two_pipelines_in_step_do_not_mix(make_wan, movie, fresh, plan):
    pipes, results = [make_wan(), make_wan()], {}
    settings: list[dict[str, Any]] = [{"guidance": 3.0}, {"height": 64}]
    barrier = threading.Barrier(2, timeout=60)

    def in_step(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        barrier.wait()
        return {}

    def run(place: int) -> None:
        sparse(pipes[place], plan)
        results[place] = movie(pipes[place], callback_on_step_end=in_step, **settings[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        assert torch.equal(results[place], fresh(plan, **settings[place]))


def test_two_pipelines_around_one_transformer_run_in_turn(wan, movie, fresh):
    twin = WanPipeline(**wan.components)
    twin.set_progress_bar_config(disable=True)
    sparse(wan)
    wanted = fresh()
    with pytest.raises(KeyboardInterrupt):
        movie(wan, callback_on_step_end=at_step(2, stop))
    assert torch.equal(movie(twin), wanted)
    assert torch.equal(movie(wan), wanted)


def offload_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading by its hooks")
    accelerate.dispatch_model(pipe.transformer, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offload_groups(pipe: Any) -> None:
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_model, offload_layers, offload_groups])
@pytest.mark.parametrize("first", [True, False])
def test_hooks_that_offload_change_nothing(wan, movie, fresh, offload, first):
    if first:
        offload(wan)
    sparse(wan)
    if not first:
        offload(wan)
    wanted = fresh()
    assert torch.equal(movie(wan), wanted)
    assert torch.equal(movie(wan), wanted)


def test_another_dtype_between_runs(wan, movie):
    sparse(wan)
    full = movie(wan)
    wan.to(torch.bfloat16)
    half = movie(wan)
    assert half.isfinite().all()
    assert torch.equal(movie(wan), half)
    visparse.restore(wan)
    sparse(wan)
    assert torch.equal(movie(wan), half)
    assert not torch.equal(full, half.float())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_in_the_middle_of_a_run_begin_without_states(wan, make_wan, movie, fresh, way):
    sparse(wan)
    twins: list[Any] = []
    result = movie(wan, callback_on_step_end=at_step(2, lambda pipe: twins.append(way(pipe.transformer))))
    other = make_wan(transformer=twins[0])
    assert not serving(other).states
    wanted = fresh()
    assert torch.equal(result, wanted)
    assert torch.equal(movie(other), wanted)
    assert torch.equal(movie(wan), wanted)
    assert visparse.restore(other)
    assert serving(wan) is not None


def test_lora_between_runs(wan, make_wan, movie):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    settings = {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}

    def add(pipe: Any) -> None:
        torch.manual_seed(5)
        pipe.transformer.add_adapter(peft.LoraConfig(**settings))

    sparse(wan)
    plain = movie(wan)
    add(wan)
    with_lora = movie(wan)
    other = make_wan()
    add(other)
    sparse(other)
    assert torch.equal(with_lora, movie(other))
    wan.transformer.disable_adapters()
    assert torch.equal(movie(wan), plain)
    assert not torch.equal(with_lora, plain)


# ---- steps -----------------------------------------------------------------------------------------------------------


def first_block(pipe: Any) -> Any:
    return FirstBlockCacheConfig(threshold=0.3)


def broadcast(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Any) -> Any:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 800),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 800),
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def magnitude(pipe: Any) -> Any:
    return MagCacheConfig(
        threshold=0.5, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=12, mag_ratios=torch.ones(12)
    )


@every_plan
@pytest.mark.parametrize("cache", [first_block, broadcast, faster, magnitude])
def test_caches_that_skip_layers_never_make_it_use_what_is_stale(wan, movie, reuses, plan, cache):
    sparse(wan, plan)
    wan.transformer.enable_cache(cache(wan))
    settings = {"guidance": 3.0, "num_inference_steps": 12}
    result = movie(wan, **settings)
    calls = [x.sparse_calls + x.dense_calls for x in layers(wan)]
    assert result.isfinite().all()
    assert min(calls) < 24  # layers were skipped
    assert reuses
    assert torch.equal(movie(wan, **settings), result)
    assert not serving(wan).states


@pytest.mark.parametrize(("steps", "dense", "measured"), [(2, 0, 1), (3, 0, 1), (4, 0, 2), (8, 1, 2)])
def test_runs_of_few_steps(wan, movie, reuses, steps, dense, measured):
    sparse(wan)
    assert movie(wan, num_inference_steps=steps).isfinite().all()
    counts = {(x.dense_calls - x.measured_calls, x.measured_calls, x.sparse_calls) for x in layers(wan)}
    assert counts == {(dense, measured, steps - dense - measured)}
    assert len(reuses) == 2 * 3 * (steps - dense - measured)


def test_a_run_of_one_step_is_refused_or_dense(wan, movie):
    dense = movie(wan, num_inference_steps=1)
    sparse(wan)
    with pytest.raises(ValueError, match=r"foveal, residual: wanted a dense step .* in a run of 1 .*use dense_steps=1"):
        movie(wan, num_inference_steps=1)
    assert untouched(wan.transformer)
    sparse(wan, dense_steps=1)
    with pytest.warns(RuntimeWarning, match="all 1 steps are dense"):
        assert torch.equal(movie(wan, num_inference_steps=1), dense)


def heun() -> Any:
    return FlowMatchHeunDiscreteScheduler()


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@every_plan
@pytest.mark.parametrize(("scheduler", "calls"), [(heun, 15), (unipc, 8)])
def test_schedulers_of_second_order(wan, movie, reuses, plan, scheduler, calls):
    wan.scheduler = scheduler()
    sparse(wan, plan)
    result = movie(wan, guidance=3.0, num_inference_steps=8)
    assert result.isfinite().all()
    assert {x.sparse_calls + x.dense_calls for x in layers(wan)} == {2 * calls}
    assert visparse.report(wan).models[0].steps == 8
    assert reuses
    assert not serving(wan).states
    assert torch.equal(movie(wan, guidance=3.0, num_inference_steps=8), result)


def test_a_shortened_run(make_wan, reuses):
    """Video to video: the last 4 of 8 steps, of which the first one is dense and measured."""
    parts = make_wan().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    sparse(pipe)
    random = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, 8, 32, generator=random)
    latents = pipe(
        video=torch.rand(1, 13, 3, 128, 96, generator=random),
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=128,
        width=96,
        num_inference_steps=8,
        strength=0.5,
        guidance_scale=1.0,
        output_type="latent",
        generator=random,
    ).frames
    assert latents.isfinite().all()
    model = visparse.report(pipe).models[0]
    assert (model.steps, model.dense_steps) == (4, 1)
    assert {(x.sparse_calls, x.measured_calls, x.dense_calls) for x in model.layers} == {(2, 2, 2)}
    assert {when for when, _ in reuses} == {0, 2}


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_plan
def test_all_layers_and_all_kinds_of_steps_share_one_graph(wan, movie, plan, fresh_compiler):
    torch.manual_seed(0)
    wan.transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=torch._dynamo.config.recompile_limit + 1,
        rope_max_seq_len=64,
    ).eval()
    sparse(wan, plan)
    eager = movie(wan)
    counter = CompileCounterWithBackend("aot_eager")
    wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(movie(wan), eager, atol=1e-6, rtol=1e-5)
    counts = {(x.measured_calls > 0, x.sparse_calls > 0, x.sparse_calls + x.dense_calls) for x in layers(wan)}
    assert counts == {(True, True, 6)}
    movie(wan, guidance=3.0)
    assert counter.frame_count == 1


def test_a_denoiser_compiled_as_a_whole(wan, movie, fresh_compiler):
    sparse(wan)
    eager, plain = movie(wan), wan.transformer
    wan.transformer = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="compile first and sparsify the compiled denoiser"):
        movie(wan)
    visparse.restore(wan)
    torch.compiler.reset()
    wan.transformer = torch.compile(plain, fullgraph=True, backend="aot_eager")
    sparse(wan)
    torch.testing.assert_close(movie(wan), eager, atol=1e-6, rtol=1e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "changes", "text"),
    [
        ("foveal", {"dense_steps": 0}, r"foveal, residual: wanted a dense step .*got none .*use dense_steps=1"),
        ("neighborhood", {"dense_steps": 0, "residual": None}, r"statistics: wanted a dense step .*got none"),
        ("neighborhood", {"dense_steps": {"last": 2}}, r"statistics, residual: wanted a dense step .*last 2 steps"),
        ("foveal", {"refresh": 0}, r"refresh: wanted None \(never\), an int > 0 .*got 0; leave it out"),
        ("foveal", {"residual": {"refresh": 0}}, r"residual: refresh: wanted None .*got 0"),
        ("neighborhood", {"statistics": {"refresh": -1}}, r"statistics: refresh: wanted None .*got -1"),
        ("foveal", {"keep": 0}, r"keep: wanted a share of the tiles in \(0, 1\], got 0; 0.125 is an eighth"),
        ("foveal", {"proxies": {"per_tile": 64}}, r"proxies: per_tile: wanted a power of two from 1 to 32, got 64"),
        ("foveal", {"block_k": 48}, r"block_k must be a positive multiple of 32, .*got 48"),
        ("foveal", {"residual": {"storage": "low-rank", "rank": 33}}, r"rank: wanted at most 32 .*got 33; 16 is usual"),
        ("foveal", {"residual": {"memory": 0}}, r"residual: memory: wanted GiB above 0, got 0"),
    ],
)
def test_bad_plans_are_refused_by_sparsify(wan, plan, changes, text):
    with pytest.raises(ValueError, match=text):
        sparse(wan, plan, **changes)
    assert untouched(wan.transformer)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"residual": {"memory": 1e-6}}, r"residual: memory: 1e-06 GiB is too little for 192 tokens: .*raise it"),
        ({"block_q": 40}, r"block_q: wanted a number of tokens that is a power of two, .*got 40"),
        ({"block_k": 160}, r"block_k: wanted a number of tokens that is a power of two, .*got 160"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused_before_the_first_step(wan, movie, changes, text):
    dense, calls = movie(wan), []
    hook = wan.transformer.blocks[0].attn1.register_forward_hook(lambda *args: calls.append(1))
    handle = sparse(wan, **changes)
    with pytest.raises(ValueError, match=text + ".*visparse has restored the model"):
        movie(wan)
    hook.remove()
    assert not calls
    assert untouched(wan.transformer)
    assert handle.restore() is False
    assert torch.equal(movie(wan), dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_q": 1024, "block_k": 512},
        {"residual": {"storage": "average", "group": (50, 50, 50)}},
        {"proxies": {"per_tile": 32}},
        {"proxies": {"levels": 2}},
    ],
    ids=str,
)
def test_what_is_larger_than_the_grid_is_cut(wan, movie, changes):
    sparse(wan, **changes)
    assert movie(wan).isfinite().all()
    assert {x.sparse_calls for x in layers(wan)} == {3}


def test_one_tile_that_holds_all_is_dense(wan, movie):
    dense = movie(wan)
    sparse(wan, block_q=1024, block_k=512, residual=None)
    torch.testing.assert_close(movie(wan), dense, atol=2e-5, rtol=1e-4)


# ---- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_report_and_explanation_agree(wan, movie, guidance):
    passes = 1 + (guidance > 1)
    handle = sparse(wan, keep=0.5, residual={"refresh": 0.6, "storage": "full"})
    held: list[int] = []
    movie(
        wan,
        guidance=guidance,
        callback_on_step_end=at_step(2, lambda pipe: held.append(handle.report().models[0].state_bytes or 0)),
    )
    model = handle.report().models[0]
    assert {(x.sparse_calls, x.measured_calls, x.dense_calls) for x in model.layers} == {
        (3 * passes, 2 * passes, 3 * passes)
    }
    assert all(x.state == "sparse" and not x.fallbacks for x in model.layers)
    residuals = 3 * passes * 192 * 2 * 32 * 4  # layers and passes; tokens, heads, numbers per head, bytes
    assert residuals < held[0] < 1.2 * residuals
    assert model.state_bytes == 0
    plan = handle.explain(6)
    said = [stretch for stretch in plan.stretches for _ in range(stretch.steps)]
    assert [x.sparse for x in said] == [False, False, True, True, False, True]
    assert [bool(x.measured) for x in said] == [False, True, False, False, True, False]
    for x in model.layers:
        assert x.block_density == pytest.approx(0.5)
        assert said[-1].block_density == pytest.approx((0.5, 0.5))
