"""The block map of the published Radial Attention code.

For every pair of frames the code draws a band, shrinks it to blocks and merges the blocks into one map:

1. Half-width W of the band: the whole frame at distance 0 or 1; else ``2^(bits(s) - bits(D)) * decay``, at least
   one block. ``bits`` is the bit length, s the tokens of a frame, D the distance of the frames.
2. A pair of frames, at any distance, is dropped where ``2^(bits(s) - bits(D))`` is below 128 and D is no multiple of
   128 over that.
3. With a sink, keys of the first frame are kept whole.
4. The band is laid on the blocks of the sequence where the frames lie, ``ceil(s / block)`` blocks a side; what hangs
   over is cut off. A column is high where more than 1/3 of the block's rows keep it. A block is kept where more than
   0.6 of its columns that keep anything are high.

Added here: (a) the code needs the tokens to be a multiple of the block. Where they are not, the last block is measured
by the rows that exist, and what hangs over at the end of the sequence is not cut off. (b) The blocks on the diagonal
are always kept. Where a frame is a multiple of the block they are kept anyway; where it is not, the cut and the share
of rows in step 4 can leave the code's queries at the end of a frame with no key at all.

Source: github.com/mit-han-lab/radial-attention, radial_attn/attn_mask.py.
"""

from functools import lru_cache

import torch
from torch import Tensor

from visparse.layout import Grid

_THRESHOLD = 128  # of the frame dropping; the code uses 128 whatever the block size


@lru_cache(maxsize=32)
def block_map(grid: Grid, decay: float, sink: bool, block: int) -> Tensor:
    """Return which blocks of the row-major sequence are kept.

    Args:
        grid: (frames, height, width), in tokens.
        decay: factor on the width of the band.
        sink: whether keys of the first frame are kept whole.
        block: tokens per block.

    Returns:
        bool [blocks, blocks]; do not change it, it is cached.

    Raises:
        ValueError: a frame is so small against the block that the rule keeps nothing.
    """
    frames, frame = grid[0], grid[1] * grid[2]
    check_frame(grid, block)
    tokens, side = frames * frame, -(-frame // block)
    blocks = -(-tokens // block)
    at = torch.arange(frames)
    half_width = torch.tensor([_half_width(distance, frame, decay, block) for distance in range(frames)])
    half_width = half_width[(at[:, None] - at[None]).abs()]
    if sink:
        half_width[:, 0] = frame
    # Blocks of every frame: from the one that holds its first token, ``side`` of them, the last frame all that remain.
    own = at[:, None] * frame // block + torch.arange(side + 1)
    inside = torch.where(at[:, None] == frames - 1, own < blocks, torch.arange(side + 1) < side)
    place = own * block - at[:, None] * frame  # in its frame, of a block's first slot
    exist = (tokens - own * block).clamp(max=block)

    rows, cols, pairs = place[:, None, :, None], place[None, :, None, :], half_width[:, :, None, None]
    high = _columns(rows, cols, pairs, exist[:, None, :, None] // 3 + 1, frame, block)
    some = _columns(rows, cols, pairs, torch.ones_like(rows), frame, block)
    keep = (high * 5 > some * 3) & (pairs >= 0) & inside[:, None, :, None] & inside[None, :, None, :]
    kept = torch.eye(blocks, dtype=torch.bool)
    i, j, row, col = keep.nonzero(as_tuple=True)
    kept[own[i, row], own[j, col]] = True
    return kept


def check_frame(grid: Grid, block: int) -> None:
    """Refuse a grid whose frames are so small that the published code keeps nothing between them.

    Args:
        grid: (frames, height, width), in tokens.
        block: tokens per block.

    Raises:
        ValueError: a frame has at most a third of a block.
    """
    frame = grid[1] * grid[2]
    if grid[0] > 1 and frame * 3 <= block:
        raise ValueError(
            f"block: the published code keeps nothing where a frame has at most a third of a block, got {frame} tokens "
            f"a frame (grid {grid}) and block {block}; use variant='paper' or a block below {frame * 3}"
        )


def _half_width(distance: int, frame: int, decay: float, block: int) -> int:
    """Half-width of the band between frames this far apart, in tokens; -1 where the pair of frames is dropped."""
    length = 2.0 ** (frame.bit_length() - distance.bit_length())
    if length < _THRESHOLD and distance % int(_THRESHOLD / length):
        return -1
    if distance <= 1:
        return frame
    return min(int(max(length * decay, block)), frame)


def _columns(rows: Tensor, cols: Tensor, half_width: Tensor, least: Tensor, frame: int, block: int) -> Tensor:
    """Count the columns of blocks that at least ``least`` rows of the block keep.

    A column keeps the rows at most ``half_width`` away, so those columns lie in one interval.

    Args:
        rows: int64, place in its frame of the first row of the block.
        cols: int64, the same of the first column.
        half_width: int64, of the band between the two frames, in tokens.
        least: int64, rows.
        frame: tokens of a frame.
        block: tokens per block.
    """
    first, last = rows.clamp(min=0), (rows + block - 1).clamp(max=frame - 1)
    low = torch.maximum(cols.clamp(min=0), first + least - 1 - half_width)
    high = torch.minimum((cols + block - 1).clamp(max=frame - 1), last + half_width + 1 - least)
    possible = (last - first + 1 >= least) & (2 * half_width + 1 >= least)
    return (high - low + 1).clamp(min=0) * possible
