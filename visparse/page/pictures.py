"""Pictures for the page: an animated film of all variants, stills, difference maps; as bytes or data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image, features

MAX_WIDTH = 480
"""Pixels; wider frames are made smaller for the page. The numbers come from the full frames."""


def fit_frames(frames: torch.Tensor, max_width: int = MAX_WIDTH) -> torch.Tensor:
    """Make frames at most `max_width` wide.

    Args:
        frames: `[frames, height, width, 3]`, uint8.
        max_width: pixels.

    Returns:
        Frames of the same form, the same object where they fit already.
    """
    height, width = frames.shape[1:3]
    if width <= max_width:
        return frames
    size = (max(round(height * max_width / width), 1), max_width)
    small = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return small.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def amplification(differences: Sequence[torch.Tensor]) -> int:
    """One factor for all difference maps, so that they can be compared: a power of two from 1 to 64.

    Args:
        differences: maps of `difference`.

    Returns:
        The largest power of two that keeps 99 % of the points of the strongest map below white.
    """
    strongest = max((float(torch.quantile(d.flatten()[:: _stride(d)].float(), 0.99)) for d in differences), default=0.0)
    factor = 1
    while factor < 64 and strongest * factor * 2 <= 255:
        factor *= 2
    return factor


def difference(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Absolute difference, the largest of the three colours.

    Args:
        frames, reference: `[frames, height, width, 3]`, uint8.

    Returns:
        `[frames, height, width]`, uint8.
    """
    return (frames.short() - reference.short()).abs_().amax(-1).to(torch.uint8)


def paint_difference(values: torch.Tensor, factor: int) -> torch.Tensor:
    """Colour a difference map: black for equal, then violet, orange, white.

    Args:
        values: `[frames, height, width]`, uint8.
        factor: the values are multiplied by it first.

    Returns:
        `[frames, height, width, 3]`, uint8.
    """
    stops = torch.tensor([[0, 0, 0], [70, 20, 110], [200, 60, 70], [250, 170, 40], [255, 255, 255]]).float()
    place = torch.arange(256) / 255 * (len(stops) - 1)
    low = place.floor().long().clamp_(max=len(stops) - 2)
    table = torch.lerp(stops[low], stops[low + 1], (place - low)[:, None]).round().to(torch.uint8)
    return table[(values.int() * factor).clamp_(max=255).long()]


def join_films(films: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put films of one size and length side by side.

    Args:
        films: each `[frames, height, width, 3]`, uint8.

    Returns:
        `[frames, height, width x number of films, 3]`, uint8.
    """
    return torch.cat(list(films), dim=2)


def pick_stills(frames: int, most: int) -> list[int]:
    """Indices of up to `most` frames, evenly spread, first and last among them."""
    if frames <= most:
        return list(range(frames))
    return [round(i * (frames - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def encode_film(frames: torch.Tensor, fps: float, *, kind: str | None = None) -> tuple[bytes, str]:
    """Encode an animation that loops for ever.

    Args:
        frames: `[frames, height, width, 3]`, uint8.
        fps: frames a second.
        kind: `"webp"` or `"gif"`; None: WebP where Pillow has it, else GIF.

    Returns:
        The file's bytes, and its kind.
    """
    kind = kind or picture_kind()
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    options = {"quality": 90, "method": 4, "minimize_size": False} if kind == "webp" else {}
    out = io.BytesIO()
    images[0].save(
        out, kind.upper(), save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, **options
    )
    return out.getvalue(), kind


def encode_still(frame: torch.Tensor) -> tuple[bytes, str]:
    """Encode one picture `[height, width, 3]`, uint8, as WebP, or as PNG where Pillow has no WebP."""
    kind = "webp" if picture_kind() == "webp" else "png"
    out = io.BytesIO()
    Image.fromarray(frame.numpy()).save(out, kind.upper(), **({"quality": 92} if kind == "webp" else {}))
    return out.getvalue(), kind


def picture_kind() -> str:
    """`"webp"` where this Pillow can write it, else `"gif"`."""
    return "webp" if features.check("webp") else "gif"


def data_uri(data: bytes, kind: str) -> str:
    """A picture as text that a page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _stride(values: torch.Tensor) -> int:
    # torch.quantile takes at most 2^24 values.
    return max(values.numel() // 4_000_000, 1)
