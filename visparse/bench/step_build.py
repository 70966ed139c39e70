"""Build the denoisers of `visparse bench step` with random weights, and run them at several depths or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visparse.bench.models import Architecture

Depth = tuple[int, ...]
_SHARPNESS = 3.0  # standard deviation of the logits of attention


def build(model: Architecture, layers: int, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """The denoiser with `layers` blocks of each kind and random weights.

    Weights keep the size of what goes through them, so that no part of the model is lost in rounding, and queries are
    scaled so that each query listens to few keys: an error in attention changes the output.

    Args:
        model: what to build.
        layers: blocks of each kind.
        device: where it is built.
        dtype: of its weights, but for what diffusers keeps in float32.
        seed: of the weights.

    Returns:
        The model of diffusers' class, in evaluation mode.
    """
    import diffusers

    counts = {kind.config: layers for kind in model.blocks}
    with torch.device(device):
        denoiser: Any = getattr(diffusers, model.model_class)(**model.config, **counts).eval().requires_grad_(False)
    random = torch.Generator(device).manual_seed(seed)
    kept = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    for name, parameter in denoiser.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
        if name.endswith("norm_q.weight") or name.endswith("norm_added_q.weight"):
            parameter.fill_(_SHARPNESS)
        elif parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=random)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return denoiser


def make_inputs(model: Architecture, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Random arguments of the denoiser's forward, by name."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=dtype)

    return model.inputs(model, normal)


@contextmanager
def depth_of(denoiser: Any, model: Architecture, depth: Depth) -> Iterator[None]:
    """Run with the first blocks of each kind only."""
    before = [getattr(denoiser, kind.path) for kind in model.blocks]
    for kind, blocks, count in zip(model.blocks, before, depth, strict=True):
        setattr(denoiser, kind.path, nn.ModuleList(blocks[:count]))
    try:
        yield
    finally:
        for kind, blocks in zip(model.blocks, before, strict=True):
            setattr(denoiser, kind.path, blocks)


@contextmanager
def compiled_blocks(denoiser: Any, model: Architecture, backend: str) -> Iterator[None]:
    """Compile each block, as `compile_repeated_blocks` does; models that list no repeated blocks too."""
    blocks = [block for kind in model.blocks for block in getattr(denoiser, kind.path)]
    torch.compiler.reset()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()
