"""Layout: the token grid of a sequence and the extra tokens around it."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Say which tokens of a sequence form the grid; the sequence is [before, grid in row-major order, after].

    A picture is ``(1, height, width)``, a line of tokens ``(1, 1, length)``.

    Args:
        grid: (frames, height, width), in tokens.
        before: extra tokens in front of the grid (text, class, register tokens).
        after: extra tokens behind it.

    Raises:
        TypeError: the grid is no tuple or list, or an element is not an int.
        ValueError: the grid has not three axes, or a number is too small.
    """

    grid: Grid
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not isinstance(self.grid, (tuple, list)):
            raise TypeError(f"grid: wanted (frames, height, width), got {type(self.grid).__name__} {self.grid!r}")
        grid = tuple(self.grid)
        if len(grid) != 3:
            raise ValueError(
                f"grid: wanted (frames, height, width), got {len(grid)} numbers; "
                "write a picture as (1, height, width) and a line as (1, 1, length)"
            )
        for axis, length in zip(("frames", "height", "width"), grid, strict=True):
            _check_int(f"grid {axis}", length, 1)
        _check_int("before", self.before, 0)
        _check_int("after", self.after, 0)
        object.__setattr__(self, "grid", grid)

    @property
    def visual(self) -> int:
        """Tokens of the grid."""
        return prod(self.grid)

    @property
    def extra(self) -> int:
        """Tokens before and after the grid."""
        return self.before + self.after

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.visual + self.extra

    def coordinates(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the (frame, row, column) of every token of the grid, int64 [visual, 3]."""
        return coordinates(torch.arange(self.visual, device=device), self.grid)


def coordinates(index: Tensor, grid: Grid) -> Tensor:
    """Turn row-major indices into coordinates.

    Args:
        index: int64 [...], index of a token inside the grid.
        grid: (frames, height, width), in tokens.

    Returns:
        int64 [..., 3]: frame, row, column.
    """
    _, height, width = grid
    return torch.stack((index // (height * width), index // width % height, index % width), dim=-1)


def _check_int(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__} {value!r}; convert it with int()")
    if value < low:
        raise ValueError(f"{name}: wanted at least {low}, got {value}; count it in tokens, after patching")
