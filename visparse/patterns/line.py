"""Patterns on a line: tokens have a place on a line, and what is kept depends on how far apart two places are."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from visparse.distinct import distinct_rows
from visparse.layout import Grid, coordinates
from visparse.patterns.base import Pattern


@dataclass(frozen=True, kw_only=True)
class LinePattern(Pattern):
    """Base of patterns that keep pairs by the distance of two places on a line, and some keys for every query.

    Blocks are judged by their range of places, and blocks that differ only by a shift have equal masks.
    """

    @abstractmethod
    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the place of tokens on the line.

        Args:
            at: int64 [..., 3], coordinates (frame, row, column).
            grid: (frames, height, width), in tokens.

        Returns:
            int64 [...], at least 0. Tokens may share a place.
        """

    @abstractmethod
    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Say at which distances pairs are kept.

        Args:
            distance: int64 [...], between two places, at least 0.
            grid: (frames, height, width), in tokens.

        Returns:
            bool [...].

        Raises:
            ValueError: the pattern does not fit the grid.
        """

    def always(self, k: Tensor, grid: Grid) -> Tensor | None:
        """Say which keys every query sees; None where there are none.

        Args:
            k: int64 [..., 3], coordinates of keys.
            grid: (frames, height, width), in tokens.

        Returns:
            bool [...] or None.
        """
        return None

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        kept = self.near((self.place(k, grid) - self.place(q, grid)).abs(), grid)
        always = self.always(k, grid)
        return kept if always is None else kept | always

    def cover(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Bound what is kept between blocks of tokens by their ranges of places; see `Pattern.cover`."""
        line = _line(self, grid).to(q.device)
        (q_low, q_high), k_extent = line.extent(q), line.extent(k)
        count, distances = line.kept_of((q_low[:, None], q_high[:, None]), k_extent)
        some, every = count > 0, count == distances
        if line.always is not None:
            seen = line.always[k.clamp(min=0)]
            some |= (seen & (k >= 0)).any(1)
            every |= (seen | (k < 0)).all(1)
        real = (q >= 0).any(1)[:, None] & (k >= 0).any(1)
        return some & real, every & real

    def alike(self, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid) -> Tensor:
        """Number pairs of blocks so that equal numbers mean equal masks; see `Pattern.alike`.

        The mask depends on the places inside each block, on the shift between the blocks, and on which keys of the
        block every query sees; where the blocks are far apart, on the last only.
        """
        line = _line(self, grid).to(q.device)
        length = len(line.sums) - 1
        (q_first, q_shape), (k_first, k_shape) = line.shapes(q), line.shapes(k)
        shape = q_shape[rows] * len(k) + k_shape[cols]
        number = shape * (2 * length) + k_first[cols] - q_first[rows] + length
        if line.always is None:
            return number
        seen = distinct_rows((line.always[k.clamp(min=0)] & (k >= 0)).to(torch.int32))[1][cols]
        (q_low, q_high), (k_low, k_high) = line.extent(q), line.extent(k)
        count, _ = line.kept_of((q_low[rows], q_high[rows]), (k_low[cols], k_high[cols]))
        padding = distinct_rows((q < 0).to(torch.int32))[1][rows]
        return torch.where(count > 0, number * len(k) + seen, -1 - padding * len(k) - seen)


class _Line(NamedTuple):
    place: Tensor  # int64 [visual], of each token in row-major order
    sums: Tensor  # int64 [length + 1], how many of the distances 0 to n - 1 are kept, for every n
    always: Tensor | None  # bool [visual], keys that every query sees

    def to(self, device: torch.device) -> "_Line":
        always = None if self.always is None else self.always.to(device)
        return _Line(self.place.to(device), self.sums.to(device), always)

    def extent(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """First and last place of each block, int64 [n]."""
        place, padding = self.place[blocks.clamp(min=0)], blocks < 0
        return place.masked_fill(padding, len(self.sums)).amin(1), place.masked_fill(padding, -1).amax(1)

    def kept_of(self, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the distances between two ranges of places: how many are kept, and how many there are, int64."""
        least, most = k[0] - q[1], k[1] - q[0]
        furthest = torch.maximum(most, -least).clamp(0, len(self.sums) - 2)
        nearest = torch.minimum(torch.maximum(least, -most).clamp(min=0), furthest)
        return self.sums[furthest + 1] - self.sums[nearest], furthest - nearest + 1

    def shapes(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Place of the first slot, and a number that is equal for blocks that are equal but for a shift, int64 [n]."""
        place = self.place[blocks.clamp(min=0)]
        shifted = (place - place[:, :1] + len(self.sums)).masked_fill(blocks < 0, -1)
        return place[:, 0], distinct_rows(shifted)[1]


@lru_cache(maxsize=32)
def _line(pattern: LinePattern, grid: Grid) -> _Line:
    at = coordinates(torch.arange(prod(grid)), grid)
    place = pattern.place(at, grid)
    near = pattern.near(torch.arange(int(place.max()) + 1), grid)
    return _Line(place, torch.nn.functional.pad(near.long().cumsum(0), (1, 0)), pattern.always(at, grid))


def row_major(at: Tensor, grid: Grid) -> Tensor:
    """Return the row-major index of tokens, int64 [...].

    Args:
        at: int64 [..., 3], coordinates (frame, row, column).
        grid: (frames, height, width), in tokens.
    """
    return (at[..., 0] * grid[1] + at[..., 1]) * grid[2] + at[..., 2]


def in_frame(at: Tensor, grid: Grid) -> Tensor:
    """Return the place of tokens inside their frame, in row-major order, int64 [...].

    Args:
        at: int64 [..., 3], coordinates (frame, row, column).
        grid: (frames, height, width), in tokens.
    """
    return at[..., 1] * grid[2] + at[..., 2]


def pixel_major(at: Tensor, grid: Grid) -> Tensor:
    """Return the index of tokens where all frames of a place lie together, int64 [...].

    Args:
        at: int64 [..., 3], coordinates (frame, row, column).
        grid: (frames, height, width), in tokens.
    """
    return in_frame(at, grid) * grid[0] + at[..., 0]


def check_int(name: str, value: object, low: int, hint: str) -> None:
    """Refuse a parameter that is no whole number or too small.

    Args:
        name: of the parameter.
        value: what came.
        low: smallest value.
        hint: what to do, for the error text.

    Raises:
        TypeError: not an int.
        ValueError: below ``low``.
    """
    if type(value) is not int:
        raise TypeError(f"{name}: wanted a whole number, got {type(value).__name__} {value!r}; {hint}")
    if value < low:
        raise ValueError(f"{name}: wanted at least {low}, got {value}; {hint}")


@dataclass(frozen=True, kw_only=True)
class LineWindow(LinePattern):
    """Base of the windows of a fixed width on the sequence of all tokens.

    Args:
        width: of the window, in tokens.
    """

    sequence: ClassVar[str]

    width: int

    def __post_init__(self) -> None:
        """Check the width."""
        check_int("width", self.width, 1, f"count it in tokens of the {self.sequence} sequence")

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep the window; see `LinePattern.near`."""
        check_window(self.width, grid)
        return distance <= self.width // 2


def check_window(width: int, grid: Grid) -> None:
    """Refuse a window on the sequence of all tokens that is larger than the sequence.

    Args:
        width: of the window, in tokens.
        grid: (frames, height, width), in tokens.

    Raises:
        ValueError: it is larger.
    """
    tokens = prod(grid)
    if width > tokens:
        raise ValueError(
            f"width: wanted at most the {tokens} tokens of the grid {grid}, got {width}; "
            "make it smaller, or use the pattern dense"
        )


def scaled(length: float, ratio: float, most: int) -> int:
    """Return a length in proportion, rounded, at least 1 and at most ``most``.

    Args:
        length: in tokens.
        ratio: target over source.
        most: largest length, in tokens.
    """
    return max(1, min(most, round(length * ratio)))
