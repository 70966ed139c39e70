"""Compensated plans under caches that skip layers, few steps, schedulers of second order and shortened runs."""

from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)

import visparse


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


@pytest.mark.parametrize("cache", [first_block, broadcast, faster, magnitude])
def test_caches_that_skip_layers_never_make_it_use_what_is_stale(
    wan, movie, reuses, plan, cache, sparse, serving, layers
):
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
def test_runs_of_few_steps(wan, movie, reuses, steps, dense, measured, sparse, layers):
    sparse(wan)
    assert movie(wan, num_inference_steps=steps).isfinite().all()
    counts = {(x.dense_calls - x.measured_calls, x.measured_calls, x.sparse_calls) for x in layers(wan)}
    assert counts == {(dense, measured, steps - dense - measured)}
    assert len(reuses) == 2 * 3 * (steps - dense - measured)


def test_a_run_of_one_step_is_refused_or_dense(wan, movie, sparse, untouched):
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


@pytest.mark.parametrize(("scheduler", "calls", "last_calls"), [(heun, 15, 2), (unipc, 8, 1)])
def test_schedulers_of_second_order(wan, movie, reuses, plan, scheduler, calls, last_calls, sparse, serving, layers):
    wan.scheduler = scheduler()
    sparse(wan, plan)
    result = movie(wan, guidance=3.0, num_inference_steps=8)
    assert result.isfinite().all()
    assert {x.sparse_calls + x.dense_calls for x in layers(wan)} == {2 * calls}
    assert visparse.report(wan).models[0].steps == 8
    last = [use for use in reuses if use[1] == 7]
    assert len(last) == 2 * 2 * 3 * last_calls  # measurements, passes, layers, calls of the step
    assert not serving(wan).states
    assert torch.equal(movie(wan, guidance=3.0, num_inference_steps=8), result)


def test_a_shortened_run(make_wan, reuses, sparse):
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
