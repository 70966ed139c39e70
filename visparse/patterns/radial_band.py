"""The paper's rule of Radial Attention, seen by blocks.

Between two frames the rule keeps the pairs of places at most ``reach`` apart, so blocks are judged by their frames and
by their range of places, and blocks that differ only by a shift along the frame have equal masks.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from visparse.distinct import distinct_rows
from visparse.layout import Grid
from visparse.patterns.base import presence
from visparse.patterns.tables import table_on


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
    return torch.where((at == 0)[None], frame - 1, table) if sink else table


def band_pairs(q: Tensor, k: Tensor, grid: Grid, sink: bool) -> Tensor:
    """Say which pairs are kept; see `Pattern.pairs`.

    Args:
        q: int64 [..., 3], coordinates (frame, row, column) of queries.
        k: int64 [..., 3], coordinates of keys.
        grid: (frames, height, width), in tokens.
        sink: whether every query sees the whole first frame.
    """
    q_place, k_place = ((at[..., 1] * grid[2] + at[..., 2]).to(torch.int32) for at in (q, k))
    reach = table_on(q.device, reach_table, grid, sink)[q[..., 0], k[..., 0]]
    return (q_place - k_place).abs() <= reach


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

    The mask depends on the shapes of the blocks, on the shift between them, and on the reach between every frame of the
    one and every frame of the other.
    """
    q_at, k_at = _extent(q, grid), _extent(k, grid)
    q_shape, k_shape = _shape(q, grid), _shape(k, grid)
    reach = _reach_number(q_at.sets, k_at.sets, grid, sink)
    frame = grid[1] * grid[2]
    shift = k[cols, 0] % frame - q[rows, 0] % frame + frame
    shape = q_shape[rows] * len(k) + k_shape[cols]
    return (shape * reach.numel() + reach[q_at.which[rows], k_at.which[cols]]) * (2 * frame) + shift


class _Extent(NamedTuple):
    """What the rule needs to know of blocks to bound them."""

    sets: Tensor  # bool [sets, frames], the distinct sets of frames
    which: Tensor  # int64 [n], set of frames of each block
    low: Tensor  # int64 [n], first place in row-major order inside a frame
    high: Tensor  # int64 [n], last place


def _extent(blocks: Tensor, grid: Grid) -> _Extent:
    frame = grid[1] * grid[2]
    tokens = torch.arange(prod(grid), device=blocks.device)
    sets, which = distinct_rows(presence(blocks, tokens // frame, grid[0]).to(torch.int32))
    place, padding = blocks % frame, blocks < 0
    low, high = place.masked_fill(padding, frame).amin(1), place.masked_fill(padding, -1).amax(1)
    return _Extent(sets.bool(), which, low, high)


def _shape(blocks: Tensor, grid: Grid) -> Tensor:
    """Number blocks so that equal numbers mean equal but for a shift, int64 [n]."""
    frame = grid[1] * grid[2]
    at, place = blocks // frame, blocks % frame
    shifted = (at - at[:, :1] + grid[0]) * 2 * frame + place - place[:, :1] + frame
    return distinct_rows(shifted.masked_fill(blocks < 0, -1))[1]


def _reach_number(q: Tensor, k: Tensor, grid: Grid, sink: bool) -> Tensor:
    """Number pairs of sets of frames, int64 [q sets, k sets]; equal numbers mean equal reaches, frame by frame."""
    reach = torch.nn.functional.pad(reach_table(grid, sink).to(q.device), (0, 1, 0, 1), value=-2)
    q_frames, k_frames = _frames(q), _frames(k)
    table = reach[q_frames[:, None, :, None], k_frames[None, :, None, :]]
    return distinct_rows(table.flatten(0, 1))[1].view(len(q), len(k))


def _frames(sets: Tensor) -> Tensor:
    """List the frames of every set in ascending order, int64 [sets, most]; the number of frames is padding."""
    frames = sets.shape[1]
    at = torch.arange(frames, device=sets.device).where(sets, frames).sort(1).values
    return at[:, : int(sets.sum(1).max())]


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
