"""Offloading by accelerate and diffusers on a GPU: foveal gives what it gives without, and leaves nothing behind.

The same bodies run on a CPU where the libraries can offload from it to itself; memory is looked at on a GPU only.
"""

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import visparse
from visparse import SparsePlan
from visparse.compensation import ReuseResidual
from visparse.compensation.serve import Compensation
from visparse.measure.generate import load_pipeline
from visparse.presets import foveal
from visparse_pipelines import tiny_video_path

STEPS, MEASURED = 5, (1, 3)  # foveal: the last of two dense steps, and 60 % of the run
SLACK = 2**21  # the allocator rounds; what a run keeps is 10 MiB
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def whole_models(pipe: Any, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def layer_by_layer(pipe: Any, device: torch.device) -> None:
    if device.type == "cuda":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    for part in pipe.components.values():  # diffusers names the CPU "cpu:0", and accelerate fails there
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)


def groups_of_blocks(pipe: Any, device: torch.device) -> None:
    _groups(pipe, device, offload_type="block_level", num_blocks_per_group=2)


def groups_of_layers(pipe: Any, device: torch.device) -> None:
    _groups(pipe, device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _groups(pipe: Any, device: torch.device, **settings: Any) -> None:
    pipe.text_encoder.to(device)
    pipe.vae.to(device)
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **settings)


OFFLOADS = [whole_models, layer_by_layer, groups_of_blocks, groups_of_layers]


def plan_with(storage: str) -> SparsePlan:
    changed = foveal().to_dict() | {"residual": ReuseResidual(refresh=0.6, storage=storage).to_dict()}
    return SparsePlan.from_dict(changed | {"dense_steps": 2})


def pipeline(device: str) -> Any:
    pipe, _ = load_pipeline(tiny_video_path(), device="cpu", dtype="bfloat16" if device == "cuda" else "float32")
    return pipe


def sparse(pipe: Any, storage: str, device: str) -> Any:
    blocks = {} if device == "cuda" else {"block_q": 64, "block_k": 32}
    return visparse.sparsify(pipe, plan_with(storage), strict=True, share=0.25, **blocks)


def film(pipe: Any, **settings: Any) -> Tensor:
    side, frames = (64, 9) if pipe._execution_device.type == "cuda" else (32, 5)
    made: Tensor = pipe(
        "an airplane, the camera pans left",
        height=side,
        width=side,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **settings,
    ).frames
    return made.float().cpu()


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


@cache
def expected(device: str, storage: str) -> tuple[Tensor, Tensor, float]:
    """Without offload: a sparse film, a dense one, and how far two equal sparse runs are apart."""
    pipe = pipeline(device).to(device)
    handle = sparse(pipe, storage, device)
    out, again = film(pipe), film(pipe)
    handle.restore()
    return out, film(pipe), error(again, out)


def check_state(handle: Any) -> None:
    """All layers ran as planned, and nothing is kept for another run."""
    model = handle.report().models[0]
    measured = 2 * len(MEASURED)  # two branches
    assert {(x.state, x.sparse_calls, x.measured_calls) for x in model.layers} == {
        ("sparse", 2 * (STEPS - 1) - measured, measured)
    }
    assert model.state_bytes == 0


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    ("device", "storage", "first"),
    [
        pytest.param("cpu", "full", True, id="cpu, full"),
        pytest.param("cuda", "full", True, id="cuda, full", marks=pytest.mark.gpu),
        pytest.param("cuda", "full", False, id="cuda, full, sparsify first", marks=pytest.mark.gpu),
        pytest.param("cuda", "host", True, id="cuda, host", marks=pytest.mark.gpu),
    ],
)
def test_two_runs_give_what_they_give_without_offload(
    device: str, storage: str, offload: Callable[[Any, torch.device], None], first: bool
) -> None:
    wanted, dense, floor = expected(device, storage)
    assert error(wanted, dense) > max(0.001, 100 * floor)
    pipe = pipeline(device)
    if first:
        offload(pipe, torch.device(device))
    handle = sparse(pipe, storage, device)
    if not first:
        offload(pipe, torch.device(device))
    for _ in range(2):
        out = film(pipe)
        assert error(out, wanted) <= 2 * floor
        check_state(handle)
    handle.restore()
    assert error(film(pipe), dense) <= 2 * floor


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["full", "host"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_memory_of_the_gpu(storage: str, offload: Callable[[Any, torch.device], None]) -> None:
    """Offload takes less than the run without, no run takes more than the one before, and none leaves anything."""

    def settled() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peaks(pipe: Any, begun: int) -> list[int]:
        found = []
        for _ in range(3):
            settled()
            torch.cuda.reset_peak_memory_stats()
            film(pipe)
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated() - begun)
        return found

    expected("cuda", storage)  # what libraries take for themselves, and lists that are cached
    begun = settled()
    pipe = pipeline("cuda").to("cuda")
    handle = sparse(pipe, storage, "cuda")
    without = peaks(pipe, begun)
    handle.restore()
    del pipe, handle

    begun = settled()
    pipe = pipeline("cuda")
    offload(pipe, torch.device("cuda"))
    handle = sparse(pipe, storage, "cuda")
    peak = peaks(pipe, begun)
    assert max(peak) < min(without)
    assert peak[2] <= peak[1] + SLACK
    left = settled()
    film(pipe)
    assert settled() <= left + SLACK
    check_state(handle)
    handle.restore()


@pytest.mark.gpu
def test_a_residual_on_the_host_takes_less_of_the_gpu() -> None:
    """After the step that measures, what lies on the GPU are the tiles that were chosen."""
    kept = {}
    for storage in ("full", "host"):
        pipe = pipeline("cuda")
        whole_models(pipe, torch.device("cuda"))
        handle = sparse(pipe, storage, "cuda")

        def look(
            one: Any, step: int, t: object, values: dict[str, Any], handle: Any = handle, storage: str = storage
        ) -> dict[str, Any]:
            if step == MEASURED[0]:
                kept[storage] = handle.report().models[0].state_bytes
            return values

        film(pipe, callback_on_step_end=look)
        handle.restore()
    assert 0 < kept["host"] < kept["full"] / 2


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_run_leaves_nothing_to_the_next(
    device: str, offload: Callable[[Any, torch.device], None]
) -> None:
    wanted, _, floor = expected(device, "full")
    pipe = pipeline(device)
    offload(pipe, torch.device(device))
    handle = sparse(pipe, "full", device)

    def stop(one: Any, step: int, t: object, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise InterruptedError
        return values

    with pytest.raises(InterruptedError):
        film(pipe, callback_on_step_end=stop)
    assert error(film(pipe), wanted) <= 2 * floor
    check_state(handle)
    served: Compensation = handle._sessions["transformer"].router.compensation
    assert not served.states
