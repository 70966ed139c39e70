"""Pixels: the size of a pipeline's videos or pictures that gives a wanted grid of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from visparse.adapter import find_denoisers, unwrapped
from visparse.layout import Grid

_AXES = ("num_frames", "height", "width")
_OPTIONS = "leave the grid out and give height, width and num_frames (--height, --width, --frames)"


def call_for(pipe: Any, grid: Grid, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call with the size that should give a grid.

    Pixels follow from the scale factors of the pipeline's decoder and from the patch size of its denoiser.

    Args:
        pipe: a diffusers pipeline.
        grid: (frames, height, width) in tokens; frames are 1 for pictures.
        call: the other arguments.

    Returns:
        `call` with `height` and `width` in pixels, and `num_frames` where the pipeline takes it.

    Raises:
        ValueError: no grid, one of the three is in `call` already, or the pipeline does not tell what is needed.
    """
    if len(grid) != 3 or any(type(n) is not int or n < 1 for n in grid):
        raise ValueError(f"grid: wanted (frames, height, width) in tokens, each at least 1, got {grid!r}")
    if isinstance(pipe, nn.Module):
        raise ValueError(f"grid: wanted a pipeline, got a bare {type(pipe).__name__}, whose inputs have their own size")
    both = [name for name in _AXES if name in call]
    if both:
        raise ValueError(f"grid: it says the size already, so it does not go with {', '.join(both)}; leave one out")
    known = inspect.signature(type(pipe).__call__).parameters
    if not {"height", "width"} <= set(known):
        raise ValueError(f"grid: {type(pipe).__name__} takes neither height nor width; leave the grid out")
    if "num_frames" not in known and grid[0] > 1:
        raise ValueError(f"grid: {type(pipe).__name__} makes pictures, wanted 1 frame, got {grid[0]}; use 1xHxW")
    module, _ = next(iter(find_denoisers(pipe).values()))
    frame, *patch = _patch(pipe, unwrapped(module).config)
    scale = _scale(pipe, "vae_scale_factor_spatial", "vae_scale_factor")
    found = {"height": grid[1] * patch[0] * scale, "width": grid[2] * patch[1] * scale}
    if "num_frames" in known:  # decoders of videos: the first latent frame is one frame
        found["num_frames"] = (grid[0] * frame - 1) * _scale(pipe, "vae_scale_factor_temporal") + 1
    return {**call, **found}


def check_grid(wanted: Grid | None, seen: Grid, call: Mapping[str, Any]) -> None:
    """Refuse a grid that is not the wanted one.

    Args:
        wanted: None: any.
        seen: by the denoiser.
        call: arguments of the pipeline's call.

    Raises:
        ValueError: they differ.
    """
    if wanted is None or tuple(wanted) == tuple(seen):
        return
    pixels = ", ".join(f"{name}={call[name]}" for name in _AXES if name in call)
    raise ValueError(
        f"grid: wanted {'x'.join(map(str, wanted))}, but {pixels} gave {'x'.join(map(str, seen))}; {_OPTIONS}"
    )


def _patch(pipe: Any, config: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of one token."""
    size = getattr(config, "patch_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 3:
        return int(size[0]), int(size[1]), int(size[2])
    if type(size) is not int:
        raise ValueError(f"grid: {type(pipe).__name__}'s denoiser has patch_size {size!r}, wanted 1 or 3; {_OPTIONS}")
    size *= 2 if _is_packed(pipe, config) else 1
    return getattr(config, "patch_size_t", None) or 1, size, size


def _is_packed(pipe: Any, config: Any) -> bool:
    """Whether the pipeline packs 2 x 2 latents into each token before the denoiser sees them, as FLUX does."""
    latent = getattr(getattr(pipe, "vae", None), "config", None)
    channels = getattr(latent, "latent_channels", None) or getattr(latent, "z_dim", None)
    made = getattr(config, "out_channels", None) or getattr(config, "in_channels", None)
    return channels is not None and made == 4 * channels


def _scale(pipe: Any, *names: str) -> int:
    """Pixels, or frames, of one latent."""
    for name in names:
        value = getattr(pipe, name, None)
        if type(value) is int:
            return value
    raise ValueError(f"grid: {type(pipe).__name__} does not tell its {names[0]}; {_OPTIONS}")
