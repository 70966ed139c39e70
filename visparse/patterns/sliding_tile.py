"""SlidingTile: tiles of queries see a window of whole tiles (STA)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.axiswise import Axiswise
from visparse.patterns.lengths import Lengths, at_most, check_lengths, on_grid


@dataclass(frozen=True, kw_only=True)
class SlidingTile(Axiswise):
    """Sliding tile attention: all queries of a tile see the tiles of a window around it, on every axis.

    Per axis with n tiles, the centre of the window is the query's tile, moved inward to at least ``window // 2`` and at
    most ``n - 1 - window // 2``. Tiles at most ``window // 2`` away from the centre are kept. So windows are odd: an
    even one sees a tile more than its number, or the whole axis where it reaches that.

    The published code serves grids whose axes are multiples of the tile. Here the last tile of an axis may be cut by
    its end; it counts as a tile. A single number stands for all axes that are longer than 1.

    On another grid: the tile stays, but is at most the axis. The window follows the number of tiles of its axis in
    proportion, to the nearest odd number; a window that sees the whole axis still does.

    Args:
        tile: tokens per tile, int or (frames, height, width); at most the axis.
        window: tiles per window, int or (frames, height, width); at most the tiles of the axis.

    Raises:
        TypeError: a value is not an int.
        ValueError: a value below 1.

    Source: Sliding Tile Attention, arXiv 2502.04507, section 3; github.com/hao-ai-lab/FastVideo,
        csrc/attn/st_attn/st_attn_h100.cu.
    """

    name: ClassVar[str] = "sliding_tile"

    tile: Lengths = (6, 8, 8)
    window: Lengths = (3, 3, 3)

    def __post_init__(self) -> None:
        """Check the values."""
        check_lengths("tile", self.tile)
        check_lengths("window", self.window, unit="tiles")

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where a tile or a window is longer than its axis."""
        at_most("tile", on_grid(self.tile, grid), grid, grid, "the length of the axis")
        tiles = self._tiles(grid)
        at_most("window", on_grid(self.window, grid), tiles, grid, "the tiles of the axis")

    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places are kept; see `Axiswise.axis_pairs`."""
        tile, half = on_grid(self.tile, grid)[axis], on_grid(self.window, grid)[axis] // 2
        centre = (q // tile).clamp(half, self._tiles(grid)[axis] - 1 - half)  # the upper limit wins where they cross
        return (k // tile - centre).abs() <= half

    def rescale(self, source: Grid, target: Grid) -> "SlidingTile":
        """Return the pattern for another grid; see the class."""
        self.check_grid(source)
        if source == target:
            return self
        frames, height, width = map(min, on_grid(self.tile, source), target)
        moved = replace(self, tile=(frames, height, width))
        frames, height, width = (
            new if 2 * (window // 2) + 1 >= old else window * new // old // 2 * 2 + 1
            for window, old, new in zip(
                on_grid(self.window, source), self._tiles(source), moved._tiles(target), strict=True
            )
        )
        return replace(moved, window=(frames, height, width))

    def _tiles(self, grid: Grid) -> tuple[int, int, int]:
        """Tiles per axis, the cut ones counted."""
        frames, height, width = (
            -(-length // tile) for length, tile in zip(grid, on_grid(self.tile, grid), strict=True)
        )
        return frames, height, width


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("sliding_tile", tile=[2, 2, 2], window=[1, 1, 3])
