"""Offloading by accelerate and diffusers: sparse layers run where the hooks bring the weights, and reports know it."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

import visparse
from visparse.devices import execution_device
from visparse_pipelines import tiny_video_path

FOVEAL = {"share": 1.0, "dense_steps": 1, "block_q": 64, "block_k": 32}


def layer_by_layer(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does; it names the CPU "cpu:0", and accelerate fails there on any module."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def whole_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [layer_by_layer, whole_models])
@pytest.mark.parametrize("first", [True, False])
def test_all_blocks_kept_is_dense(wan: Any, film: Callable[..., Any], offload: Callable[..., Any], first: bool) -> None:
    dense = film(wan, num_inference_steps=4)
    if first:
        offload(wan)
    visparse.sparsify(wan, "foveal", **FOVEAL)
    if not first:
        offload(wan)
    out = film(wan, num_inference_steps=4)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)
    ran = visparse.report(wan).models[0]
    assert [(x.sparse_calls, x.measured_calls) for x in ran.layers] == [(2, 2)] * 3
    assert (next(wan.transformer.parameters()).device.type == "meta") == (offload is not whole_models)
    assert visparse.restore(wan)
    assert torch.equal(film(wan, num_inference_steps=4), dense)


def test_the_pipeline_that_ships() -> None:
    from visparse.measure.generate import load_pipeline

    def video(pipe: Any) -> torch.Tensor:
        made: torch.Tensor = pipe(
            "an airplane",
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).frames
        return made

    pipe, _ = load_pipeline(tiny_video_path(), device="cpu")
    dense = video(pipe)
    visparse.sparsify(pipe, "foveal", **FOVEAL)
    layer_by_layer(pipe)
    torch.testing.assert_close(video(pipe), dense, atol=1e-4, rtol=1e-3)
    visparse.sparsify(pipe, "foveal", share=0.2, refresh=visparse.Overlap())
    offloaded = video(pipe)
    pipe, _ = load_pipeline(tiny_video_path(), device="cpu")
    visparse.sparsify(pipe, "foveal", share=0.2, refresh=visparse.Overlap())
    assert torch.equal(offloaded, video(pipe))


@pytest.mark.parametrize("plan", ["neighborhood", "foveal"])
def test_reports_before_a_run_are_those_of_the_device_that_will_run(wan: Any, plan: str) -> None:
    def ask(handle: Any) -> tuple[Any, ...]:
        model = handle.report(grid=(4, 8, 6)).models[0]
        return model.impl, model.block_density, handle.explain(10, grid=(4, 8, 6)).milliseconds

    wanted = ask(visparse.sparsify(wan, plan))
    layer_by_layer(wan)
    assert ask(visparse.sparsify(wan, plan)) == wanted


def test_the_device_is_where_hooks_bring_the_weights(wan: Any) -> None:
    layer_by_layer(wan)
    assert next(wan.transformer.parameters()).device.type == "meta"
    assert execution_device(wan.transformer) == torch.device("cpu")
    wan.transformer.blocks[0].attn1.to_q._hf_hook.execution_device = 1  # a number, as accelerate gives it for a GPU
    assert execution_device(wan.transformer.blocks[0].attn1.to_q) == torch.device(1)


def test_the_device_of_groups_is_where_they_are_brought(wan: Any) -> None:
    device = torch.device("cpu")
    wan.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    registry = wan.transformer._diffusers_hook
    registry.get_hook("group_offloading").config.onload_device = torch.device("cuda:1")
    assert execution_device(wan.transformer) == torch.device("cuda:1")
