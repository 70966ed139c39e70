"""SpatialHead: near frames, and the first one."""

from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import ClassVar

from torch import Tensor

from visparse.errors import nearest
from visparse.layout import Grid, Layout
from visparse.patterns.line import LinePattern, row_major

_BLOCK = 128  # the published code rounds to it, whatever the kernel


@dataclass(frozen=True, kw_only=True)
class SpatialHead(LinePattern):
    """Spatial heads of Sparse VideoGen: a band around the diagonal, some frames wide, and the first frame.

    The mask is the one that the published code runs. In the row-major sequence i and j see each other where |i - j| is
    at most ``width`` frames on either side, rounded to 128 tokens. ``rounding="up"`` is the program for Wan: up to a
    multiple of 128, distance at most that. ``rounding="down"`` is the one for HunyuanVideo and CogVideoX: down to a
    multiple of 128, distance below that. With ``sink`` every query sees the first frame, as in Wan; HunyuanVideo has
    none, and CogVideoX leaves the choice. Text is seen by all and sees all, which is so for every pattern here. The
    masks that the published code compares in order to choose between spatial and temporal are others.

    On another grid: the width follows the number of frames, so that the density stays.

    Args:
        width: frames on either side, any number above 0 and at most the frames of the grid; `svg_width` gives the
            published one for a density.
        sink: whether every query sees the first frame.
        rounding: ``"up"`` or ``"down"``.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a width that is not positive, or an unknown rounding.

    Source: Sparse VideoGen, arXiv 2502.01776; svg/models of github.com/svg-project/Sparse-VideoGen.
    """

    name: ClassVar[str] = "spatial_head"

    width: float
    sink: bool = True
    rounding: str = "up"

    def __post_init__(self) -> None:
        """Check the values."""
        check_svg(self.width, self.rounding)
        if type(self.sink) is not bool:
            raise TypeError(
                f"sink: wanted a bool, got {type(self.sink).__name__} {self.sink!r}; True keeps the first frame"
            )

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the row-major index; see `LinePattern.place`."""
        return row_major(at, grid)

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep the band; see `LinePattern.near`."""
        return distance <= svg_reach(self.width, self.rounding, grid)

    def always(self, k: Tensor, grid: Grid) -> Tensor | None:
        """Return the first frame; see `LinePattern.always`."""
        return k[..., 0] == 0 if self.sink else None

    def rescale(self, source: Grid, target: Grid) -> "SpatialHead":
        """Return the band that is the same share of the frames; see `Pattern.rescale`."""
        return replace(self, width=min(self.width * target[0] / source[0], target[0]))


def svg_width(density: float, layout: Layout) -> float:
    """Return the width of the bands of Sparse VideoGen that keep a share of all pairs.

    The published code calls this share sparsity. It counts the rows and columns of text, but not the first frame.

    Args:
        density: kept pairs over all pairs, text included.
        layout: grid and extra tokens.

    Returns:
        Frames on either side, for `SpatialHead` and `TemporalHead`.

    Raises:
        ValueError: the text alone needs that much, or the density is 1 or more.

    Source: ``sparsity_to_width`` of github.com/svg-project/Sparse-VideoGen.
    """
    tokens = layout.tokens
    share = (density * tokens**2 - 2 * tokens * layout.extra) / tokens**2
    if not (share > 0 and density < 1):
        least = 2 * layout.extra / tokens
        raise ValueError(f"density: wanted above {least:.3f}, which the text takes, and below 1, got {density}")
    return tokens * (1 - sqrt(1 - share)) / (layout.grid[1] * layout.grid[2])


def svg_reach(width: float, rounding: str, grid: Grid) -> int:
    """Return the largest distance that the bands of Sparse VideoGen keep.

    Args:
        width: frames on either side.
        rounding: ``"up"`` or ``"down"``.
        grid: (frames, height, width), in tokens.

    Returns:
        Tokens.

    Raises:
        ValueError: more frames than the grid has, or nothing would be kept.
    """
    if width > grid[0]:
        raise ValueError(f"width: wanted at most the {grid[0]} frames of the grid {grid}, got {width}; make it smaller")
    tokens = width * grid[1] * grid[2]
    if rounding == "up":
        return ceil(tokens / _BLOCK) * _BLOCK
    reach = floor(tokens / _BLOCK) * _BLOCK - 1
    if reach < 0:
        raise ValueError(
            f"width: rounded down to a multiple of {_BLOCK} tokens nothing is left of {width} frames of "
            f"{grid[1] * grid[2]} tokens (grid {grid}); make it larger, or use rounding='up'"
        )
    return reach


def check_svg(width: float, rounding: str) -> None:
    """Refuse values that no grid can make good; see `SpatialHead`.

    Args:
        width: frames on either side.
        rounding: ``"up"`` or ``"down"``.

    Raises:
        TypeError: the width is no number.
        ValueError: the width is not positive, or the rounding is unknown.
    """
    if type(width) not in (int, float):
        raise TypeError(f"width: wanted a number of frames, got {type(width).__name__} {width!r}; 1.5 is possible")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: wanted a positive number of frames, got {width}; svg_width gives one for a density")
    if rounding not in ("up", "down"):
        raise ValueError(
            f"rounding: wanted 'up' (Wan) or 'down' (HunyuanVideo, CogVideoX), got {rounding!r}"
            f"{nearest(str(rounding), ['up', 'down'])}"
        )


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("spatial_head", width=1)
