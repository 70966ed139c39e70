"""MultiDiagonal: the same place and its neighbours, in other frames."""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LineWindow, pixel_major, scaled


@dataclass(frozen=True, kw_only=True)
class MultiDiagonal(LineWindow):
    """Sparse-vDiT's multi-diagonal mode: a window after tokens of one place in all frames were put next to each other.

    In that pixel-major order a token has the index ``place * frames + frame``, with its place in row-major order inside
    the frame. Tokens i and j of that order see each other where |i - j| <= width // 2. The window is cut at the ends
    of the sequence, and it runs over the ends of rows. A query sees all frames of its own place where the width is at
    least ``2 * frames - 1``. The paper gives no widths. For a band that is repeated in every frame see `Band`.

    On another grid: the width follows the number of all tokens, so that it reaches equally far inside a frame and the
    density stays.

    Args:
        width: of the window, in tokens, at least 1 and at most the tokens of the grid; an even number counts as the
            next odd one.

    Raises:
        TypeError: the width is no whole number.
        ValueError: it is below 1.

    Source: Sparse-vDiT, arXiv 2506.03065, section 3, mode M3.
    """

    name: ClassVar[str] = "multi_diagonal"

    sequence: ClassVar[str] = "pixel-major"

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the pixel-major index; see `LinePattern.place`."""
        return pixel_major(at, grid)

    def rescale(self, source: Grid, target: Grid) -> "MultiDiagonal":
        """Return the pattern whose width is the same share of all tokens; see `Pattern.rescale`."""
        return replace(self, width=scaled(self.width, prod(target) / prod(source), prod(target)))


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("multi_diagonal", width=9)
