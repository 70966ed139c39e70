"""Skip: the head sees nothing and its output is 0."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import Factor, Pattern


@dataclass(frozen=True, kw_only=True)
class Skip(Pattern):
    """Keep nothing: a skipped head costs nothing, and extra tokens are skipped with it."""

    name: ClassVar[str] = "skip"

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Return False everywhere; see `Pattern.pairs`."""
        return torch.zeros_like(q[..., 0] + k[..., 0], dtype=torch.bool)

    def factors(self, grid: Grid) -> tuple[Factor, ...]:
        """Return one table that keeps nothing."""
        return (Factor(torch.zeros(prod(grid), dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)),)


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("skip")
