"""PowerOfTwo: blocks at a distance that is a power of two."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LinePattern, check_int, row_major


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo(LinePattern):
    """PowerAttention: the row-major sequence is cut into blocks; blocks at distance 0, 1, 2, 4, 8, ... see each other.

    Two more rules add blocks: those at a distance below ``window``, and the first ``sink`` blocks as keys for every
    query. The published mask is causal. A diffusion transformer is not: here the distance counts in both directions,
    and nothing is hidden for coming later.

    On another grid: nothing changes, all lengths are counted in blocks and the distances cover any length.

    Args:
        block: tokens per block; published is 256.
        window: blocks on either side, the own one counted, that are kept; published is 5. 1 adds nothing.
        sink: blocks at the start that every query sees; published is 1, 0 for none.

    Raises:
        TypeError: a value is no whole number.
        ValueError: a value below its range.

    Source: PowerAttention, arXiv 2503.03588, section 3.3, algorithm 1.
    """

    name: ClassVar[str] = "power_of_two"

    block: int = 256
    window: int = 5
    sink: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check_int("block", self.block, 1, "count it in tokens; 256 is published")
        check_int("window", self.window, 1, "count it in blocks; 5 is published, 1 is the own block")
        check_int("sink", self.sink, 0, "count it in blocks; 1 is published, 0 is no sink")

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the block; see `LinePattern.place`."""
        return row_major(at, grid) // self.block

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep powers of two, 0 and the window; see `LinePattern.near`."""
        return ((distance & (distance - 1)) == 0) | (distance < self.window)

    def always(self, k: Tensor, grid: Grid) -> Tensor | None:
        """Return the sink; see `LinePattern.always`."""
        return self.place(k, grid) < self.sink if self.sink else None


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("power_of_two", block=4, window=2)
