"""Disc: queries see the keys inside a circle (CLEAR)."""

from dataclasses import dataclass, replace
from math import floor, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from visparse.distinct import distinct_rows
from visparse.layout import Grid, coordinates
from visparse.patterns.base import Pattern


@dataclass(frozen=True, kw_only=True)
class Disc(Pattern):
    """Circular local attention: a query sees the keys that are less than ``radius`` away in the plane of the frame.

    A key exactly ``radius`` away is not seen. The circle is not moved at the borders, so queries there see fewer keys.
    CLEAR is defined on pictures. On a video the disc goes through all frames; intersect it with a pattern over the
    frames to end it there. On a line of tokens it is a band.

    CLEAR's variant with pooled keys adds a compensation, tokens that stand for the keys outside; it is no part of this
    pattern.

    On another grid: the radius follows the square root of the area of the frame, rounded half up, at least 1. CLEAR
    itself keeps the radius.

    Args:
        radius: of the circle, in tokens; a whole number from 1 on. CLEAR has 8, 16 and 32.

    Raises:
        TypeError: the radius is not an int.
        ValueError: it is below 1.

    Source: CLEAR, arXiv 2412.16112, section 3.3; github.com/Huage001/CLEAR.
    """

    name: ClassVar[str] = "disc"

    radius: int = 16

    def __post_init__(self) -> None:
        """Check the radius."""
        if type(self.radius) is not int:
            raise TypeError(f"radius: wanted a whole number, got {self.radius!r}; round it")
        if self.radius < 1:
            raise ValueError(f"radius: wanted at least 1, got {self.radius}; with 1 a query sees only its own place")

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        down, across = q[..., 1] - k[..., 1], q[..., 2] - k[..., 2]
        return down * down + across * across < self.radius**2

    def rescale(self, source: Grid, target: Grid) -> "Disc":
        """Return the pattern for another grid; see the class."""
        factor = sqrt(target[1] * target[2] / (source[1] * source[2]))
        return replace(self, radius=max(1, floor(self.radius * factor + 0.5)))

    def cover(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Bound what is kept between blocks by the rectangles around them; see `Pattern.cover`."""
        near = torch.zeros(len(q), len(k), dtype=torch.int64, device=q.device)
        far = torch.zeros_like(near)
        for axis in (1, 2):
            q_low, q_high = _range(q, axis, grid)
            k_low, k_high = _range(k, axis, grid)
            near += torch.maximum(k_low - q_high[:, None], q_low[:, None] - k_high).clamp(min=0) ** 2
            far += torch.maximum(k_high - q_low[:, None], q_high[:, None] - k_low) ** 2
        return near < self.radius**2, far < self.radius**2

    def alike(self, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid) -> Tensor:
        """Number pairs of blocks by their shapes and by the shift between them; see `Pattern.alike`."""
        code = _shape(q, grid)[rows] * len(k) + _shape(k, grid)[cols]
        for axis in (1, 2):
            shift = _range(k, axis, grid)[0][cols] - _range(q, axis, grid)[0][rows]
            code = code * (2 * grid[axis] + 1) + shift + grid[axis]  # a block of padding alone begins at the end
        return code


def _range(blocks: Tensor, axis: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """First and last place of each block on one axis, int64 [n] each."""
    place, padding = coordinates(blocks, grid)[..., axis], blocks < 0
    return place.masked_fill(padding, grid[axis]).amin(1), place.masked_fill(padding, -1).amax(1)


def _shape(blocks: Tensor, grid: Grid) -> Tensor:
    """Number blocks so that equal numbers mean equal in the plane but for a shift, int64 [n]."""
    row, column = (coordinates(blocks, grid)[..., axis] - _range(blocks, axis, grid)[0][:, None] for axis in (1, 2))
    return distinct_rows((row * grid[2] + column).masked_fill(blocks < 0, -1))[1]


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("disc", radius=2)
