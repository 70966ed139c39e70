"""Intersection: what all of several patterns keep."""

from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import Factor
from visparse.patterns.combined import Combined


@dataclass(frozen=True, kw_only=True)
class Intersection(Combined):
    """Keep a pair where every part keeps it.

    Parts that have nothing in common leave queries without any key of the grid; their output is then that of the extra
    tokens, or 0 where there are none.

    On another grid: every part follows its own rule.

    Args:
        patterns: the parts, at least one; they may be combined themselves.

    Raises:
        TypeError: a part is no pattern.
        ValueError: there are no parts.
    """

    name: ClassVar[str] = "intersection"

    join = and_

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return one table per axis where all parts have them; see `Pattern.axes`."""
        by_axis = self.tables(grid)
        if by_axis is None:
            return None
        frames, height, width = (reduce(and_, own) for own in by_axis)
        return frames, height, width

    def factors(self, grid: Grid) -> tuple[Factor, ...] | None:
        """Return the factors of all parts where all are separable; see `Pattern.factors`."""
        own = super().factors(grid)  # from the axes: three at most
        if own is not None:
            return own
        parts = [part.factors(grid) for part in self.patterns]
        known = [factors for factors in parts if factors is not None]
        return tuple(factor for factors in known for factor in factors) if len(known) == len(parts) else None


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("intersection", patterns=[{"name": "neighborhood", "window": [1, 3, 3]}, {"name": "radial"}])
