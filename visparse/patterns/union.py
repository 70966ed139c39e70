"""Union: what at least one of several patterns keeps."""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.combined import Combined


@dataclass(frozen=True, kw_only=True)
class Union(Combined):
    """Keep a pair where at least one part keeps it.

    A window and a sink, for example, are ``Union(patterns=(Neighborhood(window=3), FirstFrame()))``. `Skip` as a part
    adds nothing, and extra tokens stay visible beside it.

    On another grid: every part follows its own rule.

    Args:
        patterns: the parts, at least one; they may be combined themselves.

    Raises:
        TypeError: a part is no pattern.
        ValueError: there are no parts.
    """

    name: ClassVar[str] = "union"

    join = or_

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return one table per axis where the parts have them and differ on one axis at most; see `Pattern.axes`."""
        by_axis = self.tables(grid)
        if by_axis is None or sum(any(not torch.equal(table, own[0]) for table in own) for own in by_axis) > 1:
            return None
        frames, height, width = (reduce(or_, own) for own in by_axis)
        return frames, height, width


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("union", patterns=[{"name": "neighborhood", "window": [1, 3, 3]}, {"name": "radial"}])
