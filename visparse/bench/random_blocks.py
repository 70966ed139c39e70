"""Random block lists whose kept pairs do not depend on the block size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visparse_kernels import BlockLists
from visparse_kernels.bits import pack_bits

_TILES = 64


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What random lists hold.

    Args:
        share: blocks that a row visits, of all in the row.
        masked: share of the visited blocks that have a random bit mask.
        uneven: row lengths uniform from 1 to twice the share, instead of equal.
    """

    share: float
    masked: float = 0.0
    uneven: bool = False


def random_blocks(
    tokens: int,
    heads: int,
    mix: Mix,
    *,
    block_q: int,
    block_k: int,
    grain: tuple[int, int],
    device: torch.device | str,
    seed: int = 0,
) -> BlockLists:
    """Lists of random blocks, other ones for every head, drawn in the size of a grain and cut into blocks.

    Args:
        tokens: queries and keys.
        heads: number of heads.
        mix: how many blocks, and which.
        block_q: query slots per block.
        block_k: key slots per block.
        grain: sizes in which queries and keys are drawn; the kept pairs depend on it, not on the block sizes.
        device: where the lists live.
        seed: of the draw, which is made on the CPU and so the same everywhere.

    Raises:
        ValueError: a block size does not divide its grain.
    """
    grain_q, grain_k = grain
    for name, block, size in (("block_q", block_q, grain_q), ("block_k", block_k, grain_k)):
        if size % block:
            raise ValueError(f"{name}: wanted a divisor of {size}, in which the blocks are drawn, got {block}")
    n_q, n_k = -(-tokens // grain_q), -(-tokens // grain_k)
    make = torch.Generator().manual_seed(seed)
    mean = max(1, round(mix.share * n_k))
    length = torch.full((heads * n_q,), mean)
    if mix.uneven:
        length = torch.randint(1, 2 * mean + 1, (heads * n_q,), generator=make).clamp(max=n_k)
    longest = int(length.max())
    cols = torch.rand(heads * n_q, n_k, generator=make).topk(longest).indices
    kept = torch.arange(longest) < length[:, None]
    rows = torch.arange(heads * n_q)[:, None].expand_as(cols)[kept]
    cols = cols[kept]
    masked = torch.rand(rows.shape, generator=make) < mix.masked
    tile = torch.where(masked, torch.randint(0, _TILES, rows.shape, generator=make), -1)
    tiles = torch.rand(_TILES, grain_q, grain_k, generator=make) < 0.5
    parts = (grain_q // block_q, grain_k // block_k)
    blocks = (-(-tokens // block_q), -(-tokens // block_k))
    rows, cols, tile = _cut(*(x.to(device) for x in (rows, cols, tile)), grain_rows=n_q, parts=parts, blocks=blocks)
    return BlockLists.from_entries(
        q_len=tokens,
        k_len=tokens,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.arange(heads),
        q_order=None,
        k_order=None,
        rows=rows,
        cols=cols,
        tile=tile,
        tiles=_cut_tiles(tiles, block_q, block_k).to(device) if mix.masked else None,
    )


def _cut(
    rows: Tensor, cols: Tensor, tile: Tensor, *, grain_rows: int, parts: tuple[int, int], blocks: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace every drawn block by the smaller ones that it consists of, without those behind the last token."""
    i = torch.arange(parts[0], device=rows.device)[:, None]
    j = torch.arange(parts[1], device=rows.device)
    rows, cols, tile = (x[:, None, None] for x in (rows, cols, tile))
    head, row, col = rows // grain_rows, rows % grain_rows * parts[0] + i, cols * parts[1] + j
    part = torch.where(tile < 0, -1, (tile * parts[0] + i) * parts[1] + j)
    row, col = torch.broadcast_tensors(row, col)
    inside = (row < blocks[0]) & (col < blocks[1])
    return (head * blocks[0] + row)[inside], col[inside], part[inside]


def _cut_tiles(tiles: Tensor, block_q: int, block_k: int) -> Tensor:
    n, grain_q, grain_k = tiles.shape
    parts = tiles.view(n, grain_q // block_q, block_q, grain_k // block_k, block_k).transpose(2, 3)
    return pack_bits(parts.reshape(-1, block_q, block_k))
