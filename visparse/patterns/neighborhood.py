"""Neighborhood: a window on every axis of the grid, shifted inward at the borders."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import AXES, Pattern

T = TypeVar("T", int, bool)


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Pattern):
    """Generalized neighborhood attention: per axis a window of exactly ``window`` keys, all axes together.

    Groups of ``stride`` neighbouring queries share the window of their leader. With dilation the axis falls apart into
    ``dilation`` interleaved axes, each with its own window. On a causal axis a query sees keys up to itself.
    A single number stands for all axes that are longer than 1.

    NATTEN demands a window of at least 2; here 1 is allowed and means that the query sees only its own place.

    Args:
        window: keys per axis, int or (frames, height, width).
        stride: queries per axis that share a window, at most ``window``.
        dilation: step between the keys of a window; ``window * dilation`` may not exceed the axis.
        causal: bool or one bool per axis.

    Raises:
        TypeError: a value is not an int (a bool for ``causal``).
        ValueError: a value below 1, or a stride above the window.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 3; reference mask of NATTEN 0.21.
    """

    name: ClassVar[str] = "neighborhood"

    window: int | tuple[int, int, int]
    stride: int | tuple[int, int, int] = 1
    dilation: int | tuple[int, int, int] = 1
    causal: bool | tuple[bool, bool, bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        for field in ("window", "stride", "dilation", "causal"):
            value = getattr(self, field)
            wanted = bool if field == "causal" else int
            parts = value if isinstance(value, tuple) else (value,)
            if len(parts) not in (1, 3) or any(type(part) is not wanted for part in parts):
                kind = "a whole number" if wanted is int else "a bool"
                raise TypeError(f"{field}: wanted {kind} or three of them (frames, height, width), got {value!r}")
            if wanted is int and min(parts) < 1:
                raise ValueError(f"{field}: wanted at least 1, got {value}; count it in tokens")
        for axis, window, stride in zip(AXES, _three(self.window), _three(self.stride), strict=True):
            if stride > window:
                raise ValueError(
                    f"stride: wanted at most the window on every axis, got stride {stride} and window {window} "
                    f"on {axis}; lower the stride to {window} or less"
                )

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        frames, height, width = (
            table.to(q.device)[q[..., axis], k[..., axis]] for axis, table in enumerate(self.axes(grid))
        )
        return frames & height & width

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Return one table per axis; see `Pattern.axes`."""
        values = (_three(self.window), _three(self.stride), _three(self.dilation), _three(self.causal))
        tables = []
        for axis, (length, window, stride, dilation, causal) in enumerate(zip(grid, *values, strict=True)):
            if length == 1 and not isinstance(self.window, tuple):
                window = stride = 1
            if length == 1 and not isinstance(self.dilation, tuple):
                dilation = 1
            if window * dilation > length:
                raise ValueError(
                    f"window: {window} with dilation {dilation} needs {window * dilation} tokens on the {AXES[axis]} "
                    f"axis, but the grid {grid} has {length}; make window * dilation at most {length} on that axis"
                )
            tables.append(axis_table(length, window, stride, dilation, causal))
        frames, height, width = tables
        return frames, height, width


def axis_table(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Say which keys a query sees on one axis.

    Args:
        length: tokens on the axis.
        window: keys per query.
        stride: queries that share a window.
        dilation: step between keys.
        causal: whether keys after the query are hidden.

    Returns:
        bool [length, length], query by key.
    """
    at = torch.arange(length)
    q, k = (at // dilation)[:, None], (at // dilation)[None]
    own = at % dilation
    last = ((length - own + dilation - 1) // dilation - 1)[:, None]
    group = q // stride * stride
    if causal:
        leader = torch.minimum(group + stride - 1, last)
        inside = (k <= q) & (leader - k < window)
    else:
        left, right = window // 2, (window - 1) // 2
        leader = torch.minimum(group + stride // 2, last)
        leader = torch.minimum(leader.clamp(min=left), last - right)
        inside = (leader - left <= k) & (k <= leader + right)
    return inside & (own[:, None] == own[None])


def _three(value: T | tuple[T, T, T]) -> tuple[T, T, T]:
    return value if isinstance(value, tuple) else (value, value, value)


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("neighborhood", window=3)
