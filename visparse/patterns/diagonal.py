"""Diagonal: a window around the main diagonal of the row-major sequence."""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LineWindow, row_major, scaled


@dataclass(frozen=True, kw_only=True)
class Diagonal(LineWindow):
    """Sparse-vDiT's diagonal mode: tokens i and j of the row-major sequence see each other where |i - j| <= width // 2.

    The window is cut at the ends of the sequence, not shifted, and it runs over the ends of rows and frames. The paper
    gives no widths.

    On another grid: the width follows the tokens of a frame, so that it reaches equally far inside a frame.

    Args:
        width: of the window, in tokens, at least 1 and at most the tokens of the grid; an even number counts as the
            next odd one.

    Raises:
        TypeError: the width is no whole number.
        ValueError: it is below 1.

    Source: Sparse-vDiT, arXiv 2506.03065, section 3, mode M2.
    """

    name: ClassVar[str] = "diagonal"

    sequence: ClassVar[str] = "row-major"

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the row-major index; see `LinePattern.place`."""
        return row_major(at, grid)

    def rescale(self, source: Grid, target: Grid) -> "Diagonal":
        """Return the diagonal whose width is the same share of a frame; see `Pattern.rescale`."""
        ratio = target[1] * target[2] / (source[1] * source[2])
        return replace(self, width=scaled(self.width, ratio, prod(target)))


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("diagonal", width=9)
