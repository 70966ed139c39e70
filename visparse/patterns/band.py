"""Band: a band around the diagonal whose width is a share of the sequence."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LinePattern, in_frame, row_major


@dataclass(frozen=True, kw_only=True)
class Band(LinePattern):
    """Re-ttention's band: tokens i and j see each other where |i - j| <= w // 2, with w = int(N * share).

    For pictures i and j are places in the row-major sequence of all N tokens. With ``per_frame``, the form for video, N
    and the places are those of one frame, and the same band is kept between every two frames. The band is cut at the
    ends, not shifted. The published shares are 0.0625 and 0.03125; the density is another number because the band is
    cut and because w // 2 tokens are kept on either side.

    On another grid: nothing changes, the width is a share already.

    Args:
        share: width of the band as a share of the sequence, above 0 and at most 1.
        per_frame: whether the band lies in every pair of frames.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a share out of its range.

    Source: Re-ttention, arXiv 2505.22918; masks of github.com/cccrrrccc/Re-ttention.
    """

    name: ClassVar[str] = "band"

    share: float = 0.0625
    per_frame: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if type(self.share) not in (int, float):
            raise TypeError(f"share: wanted a number, got {type(self.share).__name__} {self.share!r}; 0.0625 is usual")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: wanted above 0 and at most 1, got {self.share}; 0.0625 keeps a sixteenth")
        if type(self.per_frame) is not bool:
            raise TypeError(
                f"per_frame: wanted a bool, got {type(self.per_frame).__name__} {self.per_frame!r}; "
                "True is the form for video, False the one for pictures"
            )

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the index in the sequence or in the frame; see `LinePattern.place`."""
        return in_frame(at, grid) if self.per_frame else row_major(at, grid)

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep the band; see `LinePattern.near`."""
        length = grid[1] * grid[2] if self.per_frame else prod(grid)
        return distance <= int(length * self.share) // 2


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("band", share=0.125)
