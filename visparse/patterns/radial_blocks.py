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
    if frames > 1 and frame * 3 <= block:
        raise ValueError(
            f"block: the published code keeps nothing where a frame has at most a third of a block, got {frame} tokens "
            f"a frame (grid {grid}) and block {block}; use variant='paper' or a block below {frame * 3}"
        )
    tokens = frames * frame
    blocks = -(-tokens // block)
    kept = torch.eye(blocks, dtype=torch.bool)
    shrunk: dict[tuple[int, int, int, int, int], Tensor] = {}
    for i in range(frames):
        for j in range(frames):
            half_width = frame if sink and j == 0 else _half_width(abs(i - j), frame, decay, block)
            if half_width < 0:
                continue
            row, row_offset = divmod(i * frame, block)
            col, col_offset = divmod(j * frame, block)
            side = -(-frame // block)
            n_rows = blocks - row if i == frames - 1 else side
            n_cols = blocks - col if j == frames - 1 else side
            key = (half_width, row_offset, col_offset, n_rows, n_cols)
            if key not in shrunk:
                exist = (tokens - (row + torch.arange(n_rows)) * block).clamp(max=block)
                shrunk[key] = _shrink(frame, half_width, row_offset, col_offset, exist, n_cols, block)
            kept[row : row + n_rows, col : col + n_cols] |= shrunk[key]
    return kept


def _half_width(distance: int, frame: int, decay: float, block: int) -> int:
    """Half-width of the band between frames this far apart, in tokens; -1 where the pair of frames is dropped."""
    length = 2.0 ** (frame.bit_length() - distance.bit_length())
    if length < _THRESHOLD and distance % int(_THRESHOLD / length):
        return -1
    if distance <= 1:
        return frame
    return min(int(max(length * decay, block)), frame)


def _shrink(
    frame: int, half_width: int, row_offset: int, col_offset: int, exist: Tensor, n_cols: int, block: int
) -> Tensor:
    """Shrink the band of one pair of frames to blocks, bool [len(exist), n_cols]; `exist` counts rows per block."""
    start = torch.arange(len(exist))[:, None] * block - row_offset
    col = torch.arange(n_cols * block)[None] - col_offset
    first = torch.maximum(start, col - half_width).clamp(min=0)
    last = torch.minimum(start + block - 1, col + half_width).clamp(max=frame - 1)
    rows = (last - first + 1).clamp(min=0) * ((col >= 0) & (col < frame))
    rows = rows.view(len(exist), n_cols, block)
    high = (rows * 3 > exist[:, None, None]).sum(-1)
    return high * 5 > (rows > 0).sum(-1) * 3
