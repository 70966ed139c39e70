"""Neighborhood: a window on every axis of the grid, shifted inward at the borders."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.axiswise import Axiswise
from visparse.patterns.base import AXES
from visparse.patterns.lengths import Lengths, check_lengths, in_proportion, on_grid, three


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Axiswise):
    """Generalized neighborhood attention: per axis a window of exactly ``window`` keys, all axes together.

    Groups of ``stride`` neighbouring queries share the window of their leader. With dilation the axis falls apart into
    ``dilation`` interleaved axes, each with its own window. On a causal axis a query sees keys up to itself.
    A single number stands for all axes that are longer than 1.

    NATTEN demands a window of at least 2; here 1 is allowed and means that the query sees only its own place.

    On another grid: window and stride follow their axis in proportion, rounded half up, at least 1 (a stride of 1 stays
    1). The dilation stays, but is at most the axis. The window is then cut so that ``window * dilation`` is at most the
    axis, and the stride so that it is at most the window. Causal axes stay causal.

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

    window: Lengths
    stride: Lengths = 1
    dilation: Lengths = 1
    causal: bool | tuple[bool, bool, bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        for field in ("window", "stride", "dilation"):
            check_lengths(field, getattr(self, field))
        parts = self.causal if isinstance(self.causal, tuple) else (self.causal,)
        if len(parts) not in (1, 3) or any(type(part) is not bool for part in parts):
            raise TypeError(f"causal: wanted a bool or three of them (frames, height, width), got {self.causal!r}")
        for axis, window, stride in zip(AXES, three(self.window), three(self.stride), strict=True):
            if stride > window:
                raise ValueError(
                    f"stride: wanted at most the window on every axis, got stride {stride} and window {window} "
                    f"on {axis}; lower the stride to {window} or less"
                )

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where a window with its dilation is longer than its axis."""
        windows, _, dilations = self._on(grid)
        for axis, length, window, dilation in zip(AXES, grid, windows, dilations, strict=True):
            if window * dilation > length:
                raise ValueError(
                    f"window: {window} with dilation {dilation} needs {window * dilation} tokens on the {axis} axis, "
                    f"but the grid {grid} has {length}; make window * dilation at most {length} on that axis"
                )

    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places are kept; see `Axiswise.axis_pairs`."""
        window, stride, dilation = (lengths[axis] for lengths in self._on(grid))
        causal = self.causal[axis] if isinstance(self.causal, tuple) else self.causal
        own, q, k_own, k = q % dilation, q // dilation, k % dilation, k // dilation
        last = (grid[axis] - own + dilation - 1) // dilation - 1  # of the interleaved axis of the query
        group = q // stride * stride
        if causal:
            leader = torch.minimum(group + stride - 1, last)
            inside = (k <= q) & (leader - k < window)
        else:
            left, right = window // 2, (window - 1) // 2
            leader = torch.minimum(group + stride // 2, last)
            leader = torch.minimum(leader.clamp(min=left), last - right)
            inside = (leader - left <= k) & (k <= leader + right)
        return inside & (own == k_own)

    def rescale(self, source: Grid, target: Grid) -> "Neighborhood":
        """Return the pattern for another grid; see the class."""
        self.check_grid(source)
        if source == target:
            return self
        windows, strides, dilations = self._on(source)
        grown = in_proportion(strides, source, target)
        frames, height, width = (new if old > 1 else 1 for old, new in zip(strides, grown, strict=True))
        wanted = in_proportion(windows, source, target)
        dilation = _least(dilations, target)
        window = _least(wanted, _quotient(target, dilation))
        return replace(
            self,
            window=window,
            stride=_least((frames, height, width), window),
            dilation=dilation,
        )

    def _on(self, grid: Grid) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]:
        """Window, stride and dilation on every axis."""
        windows = on_grid(self.window, grid)
        strides = on_grid(self.stride, grid)
        return windows, _least(strides, windows), on_grid(self.dilation, grid)


def _least(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = map(min, a, b)
    return frames, height, width


def _quotient(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = (whole // part for whole, part in zip(a, b, strict=True))
    return frames, height, width


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("neighborhood", window=3)
