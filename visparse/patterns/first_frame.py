"""FirstFrame: every query sees the first frame, and nothing else."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import Pattern
from visparse.patterns.line import check_int


@dataclass(frozen=True, kw_only=True)
class FirstFrame(Pattern):
    """Attention sink of video models: keys of the first frames are kept for every query, other keys for none.

    Alone it hides every other frame from itself; it is meant to be joined with another pattern.

    On another grid: the number of frames stays, as far as the target has as many.

    Args:
        frames: how many frames are kept.

    Raises:
        TypeError: the number is no whole number.
        ValueError: it is below 1.

    Source: Radial Attention, arXiv 2506.19852, section 4 (sink); Sparse VideoGen, arXiv 2502.01776.
    """

    name: ClassVar[str] = "first_frame"

    frames: int = 1

    def __post_init__(self) -> None:
        """Check the number of frames."""
        check_int("frames", self.frames, 1, "1 is usual")

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        self._check(grid)
        return (k[..., 0] < self.frames) & (q[..., 0] >= 0)

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Return one table per axis; see `Pattern.axes`."""
        self._check(grid)
        tables = [torch.ones(length, length, dtype=torch.bool) for length in grid]
        tables[0][:, self.frames :] = False
        return tables[0], tables[1], tables[2]

    def rescale(self, source: Grid, target: Grid) -> "FirstFrame":
        """Return the same sink, cut to the frames of the target; see `Pattern.rescale`."""
        return replace(self, frames=min(self.frames, target[0]))

    def _check(self, grid: Grid) -> None:
        if self.frames > grid[0]:
            raise ValueError(
                f"frames: wanted at most the {grid[0]} of the grid {grid}, got {self.frames}; keep fewer frames"
            )


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("first_frame")
