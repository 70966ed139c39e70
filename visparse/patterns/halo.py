"""Halo: blocks of queries see their block and a halo around it (HaloNet)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.axiswise import Axiswise
from visparse.patterns.lengths import Lengths, at_most, check_lengths, in_proportion, on_grid


@dataclass(frozen=True, kw_only=True)
class Halo(Axiswise):
    """Blocked local attention: all queries of a block see the keys of the block and ``halo`` keys on either side of it.

    At the borders the window is cut, so queries there see fewer keys. HaloNet fills it up with zeros that are *not*
    masked: they add exp(their position's logit) to the denominator, and nothing to the output. Such keys are no tokens,
    so no pattern can keep them, and outputs at the borders differ from HaloNet's by that factor. `Neighborhood` with
    ``window = block + 2 * halo`` and ``stride = block`` is the same inside, and moves the window inward at the borders.

    The published code wants axes that are multiples of the block; here the last block of an axis may be cut by its end.
    A single number stands for all axes that are longer than 1.

    On another grid: block and halo follow their axis in proportion, rounded half up; a block has at least one token, a
    halo that is not 0 has at least one, and is shorter than the axis.

    Args:
        block: queries per block, int or (frames, height, width); at most the axis.
        halo: keys on either side, int or (frames, height, width); 0 or more, and shorter than the axis.

    Raises:
        TypeError: a value is not an int.
        ValueError: a block below 1 or a halo below 0.

    Source: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet), arXiv 2103.12731, section
        2.2; timm, ``HaloAttn``, for the borders and the default sizes.
    """

    name: ClassVar[str] = "halo"

    block: Lengths = 8
    halo: Lengths = 3

    def __post_init__(self) -> None:
        """Check the values."""
        check_lengths("block", self.block)
        check_lengths("halo", self.halo, least=0)

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where the block or the halo is too long for its axis."""
        at_most("block", on_grid(self.block, grid), grid, grid, "the length of the axis")
        frames, height, width = (length - 1 for length in grid)
        at_most("halo", self._halos(grid), (frames, height, width), grid, "all other tokens of the axis")

    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places are kept; see `Axiswise.axis_pairs`."""
        block, halo = on_grid(self.block, grid)[axis], self._halos(grid)[axis]
        first = q // block * block
        return (first - halo <= k) & (k < first + block + halo)

    def rescale(self, source: Grid, target: Grid) -> "Halo":
        """Return the pattern for another grid; see the class."""
        self.check_grid(source)
        if source == target:
            return self
        halos = self._halos(source)
        frames, height, width = (
            min(new, length - 1) if old else 0
            for old, new, length in zip(halos, in_proportion(halos, source, target), target, strict=True)
        )
        blocks = in_proportion(on_grid(self.block, source), source, target)
        return replace(self, block=blocks, halo=(frames, height, width))

    def _halos(self, grid: Grid) -> tuple[int, int, int]:
        return on_grid(self.halo, grid, short=0)


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("halo", block=2, halo=1)
