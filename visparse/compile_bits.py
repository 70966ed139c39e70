"""Exact masks of candidate blocks, as packed bits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from visparse.distinct import distinct_rows, scratch
from visparse.layout import Grid, coordinates
from visparse.patterns.base import Factor, Pattern
from visparse_kernels.bits import pack_bits

FULL = -1  # instead of a tile, where a block is full


def block_bits(pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """Yield the masks of candidate blocks, in order, part by part so that memory stays bounded.

    Args:
        pattern: what is kept.
        grid: (frames, height, width), in tokens.
        q: int64 [n_q, block_q], row-major indices of the tokens in each query block; -1 is padding.
        k: int64 [n_k, block_k], the same for keys.
        rows: int64 [n], query block of each candidate, ascending.
        cols: int64 [n], its key block.

    Yields:
        int32 ``[m, block_q, block_k / 32]``, the next m candidates: bit j of word w is key slot 32 w + j; bits of
        padding are 0.
    """
    factors = pattern.factors(grid)
    parts = _by_pairs(pattern, grid, q, k, rows, cols) if factors is None else _by_factors(factors, q, k, rows, cols)
    first = 0
    for words in parts:
        words.masked_fill_((q[rows[first : first + len(words)]] < 0)[..., None], 0)
        first += len(words)
        yield words


def real_bits(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return which slots hold tokens: bool [n_q, block_q] of queries, int32 words [n_k, block_k / 32] of keys."""
    return q >= 0, pack_bits(k >= 0)


def number_tiles(tile: Sequence[Tensor], tiles: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Number the distinct tiles of all groups together; there is at least one group.

    Args:
        tile: int64 [n] of each group, row of its tiles, or `FULL`.
        tiles: int32 [n_tiles, block_q, words] of each group.

    Returns:
        int64 [all n], row of the distinct tiles or `FULL`, and the distinct tiles.
    """
    distinct, index = distinct_rows(torch.cat(list(tiles)))
    index = torch.cat([index, index.new_full((1,), FULL)])  # FULL = -1 reaches its last element
    first, parts = 0, []
    for own, group in zip(tile, tiles, strict=True):
        parts.append(index[torch.where(own == FULL, FULL, own + first)])
        first += len(group)
    return torch.cat(parts), distinct


def _by_factors(factors: tuple[Factor, ...], q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """AND the words of all factors; the words depend on the query's code only, so they are packed once per code."""
    real = pack_bits(k >= 0)
    tables = []
    for code, table in factors:
        code, table = code.to(q.device), table.to(q.device)
        key_code = code[k.clamp(min=0)]
        per_code = max(1, scratch(q.device) // k.numel())
        packed = [pack_bits(part[:, key_code]) for part in table.split(per_code)]
        tables.append((code[q.clamp(min=0)], torch.cat(packed)))
    words = k.shape[1] // 32
    for part in torch.arange(len(rows), device=q.device).split(max(1, scratch(q.device) // (q.shape[1] * words))):
        part_rows, part_cols = rows[part], cols[part]
        bits = real[part_cols][:, None].repeat(1, q.shape[1], 1)
        for query_code, packed_table in tables:
            bits &= packed_table[query_code[part_rows], part_cols[:, None]]
        yield bits


def _by_pairs(pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """Ask the definition, many blocks at once."""
    q_at, k_at = coordinates(q.clamp(min=0), grid), coordinates(k.clamp(min=0), grid)
    real = k >= 0
    per_part = max(1, scratch(q.device) // (q.shape[1] * k.shape[1]))
    for part_rows, part_cols in zip(rows.split(per_part), cols.split(per_part), strict=True):
        kept = pattern.pairs(q_at[part_rows][:, :, None], k_at[part_cols][:, None], grid)
        yield pack_bits(kept & real[part_cols][:, None])
