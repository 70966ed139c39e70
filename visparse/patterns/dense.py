"""Dense: every query sees every key."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import Factor, Pattern


@dataclass(frozen=True, kw_only=True)
class Dense(Pattern):
    """Keep every pair."""

    name: ClassVar[str] = "dense"

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Return True everywhere; see `Pattern.pairs`."""
        return torch.ones_like(q[..., 0] + k[..., 0], dtype=torch.bool)

    def factors(self, grid: Grid) -> tuple[Factor, ...]:
        """Return no factors: an empty product keeps everything."""
        return ()


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("dense")
