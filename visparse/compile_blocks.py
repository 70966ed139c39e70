"""Visited blocks of any pattern, by comparing blocks of tokens."""

import torch
from torch import Tensor

from visparse.compile_bits import FULL, block_bits, real_bits
from visparse.distinct import distinct_rows, first_of
from visparse.layout import Grid
from visparse.patterns.base import Pattern

_UNSEEN = -2  # instead of a tile


def block_entries(
    pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, owned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the visited blocks between blocks of tokens.

    Args:
        pattern: what is kept.
        grid: (frames, height, width), in tokens.
        q: int64 [n_q, block_q], row-major indices of the tokens in each query block; -1 is padding.
        k: int64 [n_k, block_k], the same for keys; blocks may overlap.
        owned: int64 [n_k, block_k], ``k`` with -1 where another block holds the same token; None where none does.

    Returns:
        ``rows, cols, tile`` int64 [n] (query block, key block, and mask or -1 for full) and ``tiles`` int32
        [n_tiles, block_q, block_k / 32]. Masks keep only owned keys.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    if owned is None:
        owned = k
    some, every = pattern.cover(q, owned, grid)
    every = every & (owned == k).all(1)
    full_rows, full_cols = every.nonzero(as_tuple=True)
    rows, cols = (some & ~every).nonzero(as_tuple=True)
    tile, tiles = _judge(pattern, grid, q, k, owned, rows, cols)
    seen = tile != _UNSEEN
    return (
        torch.cat([full_rows, rows[seen]]),
        torch.cat([full_cols, cols[seen]]),
        torch.cat([torch.full_like(full_rows, FULL), tile[seen]]),
        tiles,
    )


def _judge(
    pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, owned: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate candidate blocks exactly: int64 [n] tile, `FULL` or `_UNSEEN` of each, and the tiles."""
    keys = pattern.alike(q, owned, rows, cols, grid)
    if keys is None:
        return _judge_each(pattern, grid, q, k, owned, rows, cols)
    first, index = first_of(keys)
    tile, tiles = _judge_each(pattern, grid, q, k, owned, rows[first], cols[first])
    return tile[index], tiles


def _judge_each(
    pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, owned: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor]:
    q_real, k_real = real_bits(q, k)
    tile = torch.full_like(rows, _UNSEEN)
    tiles = [torch.zeros(0, q.shape[1], k.shape[1] // 32, dtype=torch.int32, device=q.device)]
    start = first_tile = 0
    for words in block_bits(pattern, grid, q, owned, rows, cols):
        part = slice(start, start + len(words))
        whole = k_real[cols[part]][:, None].where(q_real[rows[part]][..., None], 0)
        full = (words == whole).flatten(1).all(1)
        masked = (words != 0).flatten(1).any(1) & ~full
        distinct, index = distinct_rows(words[masked])
        tile[part][full] = FULL
        tile[part][masked] = index + first_tile
        tiles.append(distinct)
        first_tile += len(distinct)
        start += len(words)
    return tile, torch.cat(tiles)
