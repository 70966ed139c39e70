"""Axiswise: the base of patterns that are decided axis by axis."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import Pattern


@dataclass(frozen=True, kw_only=True)
class Axiswise(Pattern):
    """Base of patterns that keep a pair where every axis keeps it; a subclass says what one axis keeps."""

    @abstractmethod
    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places on one axis are kept.

        Args:
            axis: 0 for frames, 1 for height, 2 for width.
            q: int64 [...], places of queries.
            k: int64 [...], places of keys, broadcast against ``q``.
            grid: (frames, height, width), in tokens.

        Returns:
            bool, of the broadcast shape.
        """

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where the pattern does not fit the grid."""

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        self.check_grid(grid)
        frames, height, width = (self.axis_pairs(axis, q[..., axis], k[..., axis], grid) for axis in range(3))
        return frames & height & width

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Return one table per axis; see `Pattern.axes`."""
        self.check_grid(grid)
        places = [torch.arange(length) for length in grid]
        frames, height, width = (
            self.axis_pairs(axis, place[:, None], place[None], grid) for axis, place in enumerate(places)
        )
        return frames, height, width
