"""Stripe: fixed key columns that every query sees."""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LinePattern, check_int, row_major, scaled


@dataclass(frozen=True, kw_only=True)
class Stripe(LinePattern):
    """Sparse-vDiT's vertical stripe mode: only a fixed set of key columns is kept, the same for every query.

    The paper does not say which columns. Here they are regular: ``width`` keys out of every ``every`` in row-major
    order, the first stripe beginning at key ``offset``. A query sees itself only where it lies in a stripe.

    On another grid: ``every``, ``width`` and ``offset`` follow the tokens of a frame, so that as many stripes lie in a
    frame as before.

    Args:
        every: keys from one stripe to the next, in tokens.
        width: keys in a stripe, at most ``every``.
        offset: first key of the first stripe, below ``every``. Stripes go on before it.

    Raises:
        TypeError: a value is no whole number.
        ValueError: a value out of its range.

    Source: Sparse-vDiT, arXiv 2506.03065, section 3, mode M4.
    """

    name: ClassVar[str] = "stripe"

    every: int
    width: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_int("every", self.every, 1, "count it in tokens")
        check_int("width", self.width, 1, "count it in tokens")
        check_int("offset", self.offset, 0, "count it in tokens")
        if self.width > self.every:
            raise ValueError(
                f"width: wanted at most every={self.every}, got {self.width}; "
                "make the stripes thinner, or use the pattern dense"
            )
        if self.offset >= self.every:
            raise ValueError(
                f"offset: wanted below every={self.every}, got {self.offset}; "
                f"stripes repeat, so {self.offset % self.every} gives the same ones"
            )

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return one place for all, because distance does not matter; see `LinePattern.place`."""
        return torch.zeros_like(at[..., 0])

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep nothing by distance; see `LinePattern.near`."""
        return distance < 0

    def always(self, k: Tensor, grid: Grid) -> Tensor:
        """Return the stripes; see `LinePattern.always`."""
        if self.offset >= prod(grid) and self.offset + self.width <= self.every:
            raise ValueError(
                f"offset: no stripe lies on the {prod(grid)} tokens of the grid {grid}, got {self.offset} with "
                f"every={self.every}; make it at most {prod(grid) - 1}"
            )
        return (row_major(k, grid) - self.offset) % self.every < self.width

    def rescale(self, source: Grid, target: Grid) -> "Stripe":
        """Return stripes as many to a frame as before; see `Pattern.rescale`."""
        ratio = target[1] * target[2] / (source[1] * source[2])
        every = scaled(self.every, ratio, prod(target))
        offset = min(round(self.offset * ratio), every - 1)
        return replace(self, every=every, width=scaled(self.width, ratio, every), offset=offset)


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("stripe", every=12, width=2)
