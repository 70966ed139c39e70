"""The paper's rule of Radial Attention, seen by blocks.

Between two frames the rule keeps the pairs of places at most ``reach`` apart, so blocks are judged by their frames and
by their range of places, and blocks that differ only by a shift along the frame have equal masks.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.base import presence


@lru_cache(maxsize=32)
def reach_table(grid: Grid, sink: bool) -> Tensor:
    """Return the largest |k - l| that is kept between two frames.

    Args:
        grid: (frames, height, width), in tokens.
        sink: whether every query sees the whole first frame.

    Returns:
        int64 [frames, frames], query frame by key frame, in tokens; -1 where nothing is kept. Do not change it, it is
        cached.

    Source: Radial Attention, arXiv 2506.19852, equation 4.
    """
    frame = grid[1] * grid[2]
    reach = []
    for distance in range(grid[0]):
        width = 1 << (max(distance, 1).bit_length() - 1)
        aligned = 0 if distance % -(-width // frame) == 0 else -1
        reach.append(max(frame // width - 1, aligned))
    at = torch.arange(grid[0])
    table = torch.tensor(reach)[(at[:, None] - at[None]).abs()]
    if sink:
        table[:, 0] = frame - 1
    return table


def band_keep(q: Tensor, k: Tensor, grid: Grid, sink: bool) -> Tensor:
    """Say which pairs are kept.

    Args:
        q: int64 [..., nq, 3], coordinates (frame, row, column) of queries.
        k: int64 [..., nk, 3], coordinates of keys.
        grid: (frames, height, width), in tokens.
        sink: whether every query sees the whole first frame.

    Returns:
        bool [..., nq, nk].
    """
    q_place, k_place = (at[..., 1] * grid[2] + at[..., 2] for at in (q, k))
    reach = reach_table(grid, sink).to(q.device)[q[..., 0][..., None], k[..., 0][..., None, :]]
    return (q_place[..., None] - k_place[..., None, :]).abs() <= reach


def band_cover(q: Tensor, k: Tensor, grid: Grid, sink: bool) -> tuple[Tensor, Tensor]:
    """Bound the kept pairs of blocks by their frames and ranges of places; see `Pattern.cover`."""
    q_at, k_at = _extent(q, grid), _extent(k, grid)
    shortest, furthest = _reach_range(q_at, k_at, grid, sink)
    apart = torch.maximum(k_at.low - q_at.high[:, None], q_at.low[:, None] - k_at.high).clamp(min=0)
    spread = torch.maximum(k_at.high - q_at.low[:, None], q_at.high[:, None] - k_at.low)
    pairs = q_at.which[:, None], k_at.which
    return apart <= furthest[pairs], spread <= shortest[pairs]


def band_alike(q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid, sink: bool) -> Tensor:
    """Number pairs of blocks so that equal numbers mean equal masks; see `Pattern.alike`.

    The mask depends on the shapes of the blocks, on the shift between them and on the reach between their frames,
    which is one number for most pairs; where it is not, the sets of frames stand for it.
    """
    q_at, k_at = _extent(q, grid), _extent(k, grid)
    shortest, furthest = _reach_range(q_at, k_at, grid, sink)
    frame = grid[1] * grid[2]
    numbered = torch.arange(furthest.numel(), device=q.device).view_as(furthest)
    reach = torch.where(shortest == furthest, furthest + 1, numbered + frame + 1)
    shift = k_at.first[cols] - q_at.first[rows] + frame
    shape = q_at.shape[rows] * (int(k_at.shape.max()) + 1) + k_at.shape[cols]
    return (shape * (int(reach.max()) + 1) + reach[q_at.which[rows], k_at.which[cols]]) * (2 * frame) + shift


class _Extent(NamedTuple):
    """What the rule needs to know of blocks."""

    sets: Tensor  # bool [sets, frames], the distinct sets of frames
    which: Tensor  # int64 [n], set of frames of each block
    low: Tensor  # int64 [n], first place in row-major order inside a frame
    high: Tensor  # int64 [n], last place
    first: Tensor  # int64 [n], place of the token in the first slot
    shape: Tensor  # int64 [n], equal where blocks differ only by a shift


def _extent(blocks: Tensor, grid: Grid) -> _Extent:
    frame = grid[1] * grid[2]
    tokens = torch.arange(prod(grid), device=blocks.device)
    has = presence(blocks, tokens // frame, grid[0]).bool()
    sets, which = torch.unique(has, dim=0, return_inverse=True)
    at, place, padding = blocks // frame, blocks % frame, blocks < 0
    shifted = (at - at[:, :1] + grid[0]) * 2 * frame + place - place[:, :1] + frame
    _, shape = torch.unique(shifted.masked_fill(padding, -1), dim=0, return_inverse=True)
    low, high = place.masked_fill(padding, frame).amin(1), place.masked_fill(padding, -1).amax(1)
    return _Extent(sets, which, low, high, place[:, 0], shape)


def _reach_range(q: _Extent, k: _Extent, grid: Grid, sink: bool) -> tuple[Tensor, Tensor]:
    """Shortest and furthest reach between the frames of two sets, int64 [q sets, k sets]."""
    reach = reach_table(grid, sink).to(q.sets.device)
    # First over the frames of the keys, then over those of the queries: no table has more than three axes.
    near, far = reach.new_tensor(prod(grid)), reach.new_tensor(-1)
    by_frame = k.sets[None]
    shortest = reach[:, None].where(by_frame, near).amin(2)
    furthest = reach[:, None].where(by_frame, far).amax(2)
    own = q.sets[:, :, None]
    return shortest[None].where(own, near).amin(1), furthest[None].where(own, far).amax(1)
