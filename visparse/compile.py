"""Compile patterns to block lists."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from visparse.compile_bits import block_bits, dedupe, first_of, real_bits
from visparse.layout import Layout
from visparse.order import Order, Tile, choose_order, order_table, visual_blocks
from visparse.patterns.base import Pattern
from visparse.patterns.skip import Skip
from visparse_kernels.lists import BlockLists


def compile_lists(
    patterns: Sequence[Pattern],
    layout: Layout,
    *,
    block_q: int,
    block_k: int,
    order: str | Tile | Order = "auto",
    device: torch.device | str = "cpu",
) -> BlockLists:
    """Turn one pattern per head into block lists; the last 32 results are cached.

    Heads with equal patterns share a group. Extra tokens see everything and are seen by everything, except in skipped
    heads.

    Args:
        patterns: one per head.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block, a multiple of 32.
        order: ``"auto"`` (for each group what visits the fewest blocks), ``"row-major"``, a tile
            (frames, height, width) for queries and keys, or an `Order`.
        device: where the lists are built and live.

    Returns:
        The lists.

    Raises:
        TypeError: something in ``patterns`` is no pattern.
        ValueError: no patterns, bad block sizes or order, or a pattern that does not fit the grid.

    Source: block lists as in DESIGN, section 4.1.
    """
    heads = tuple(patterns)
    if not heads:
        raise ValueError("patterns: wanted one pattern per head, got none; give for example [Dense()] * heads")
    for pattern in heads:
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"patterns: wanted visparse patterns, got {type(pattern).__name__} {pattern!r}; "
                "build one such as Neighborhood(window=3), or read JSON with pattern_from_dict"
            )
    if type(block_q) is not int or block_q < 1:
        raise ValueError(f"block_q: wanted a positive int, got {block_q!r}; 64 or 128 are usual")
    if type(block_k) is not int or block_k < 1 or block_k % 32:
        raise ValueError(f"block_k: wanted a positive multiple of 32, got {block_k!r}; 64 or 128 are usual")
    return _compile(heads, layout, block_q, block_k, _parse_order(order), torch.device(device))


def _parse_order(order: str | Tile | Order) -> Order | None:
    if isinstance(order, Order):
        return order
    if isinstance(order, str):
        if order not in ("auto", "row-major"):
            raise ValueError(
                f"order: wanted 'auto', 'row-major', a tile such as (4, 4, 4) or an Order, got {order!r}; "
                "use 'auto' if unsure"
            )
        return None if order == "auto" else Order()
    return Order(order, order)


_FULL, _UNSEEN = -1, -2  # instead of a tile


@lru_cache(maxsize=32)
def _compile(
    heads: tuple[Pattern, ...], layout: Layout, block_q: int, block_k: int, order: Order | None, device: torch.device
) -> BlockLists:
    groups = [pattern for pattern in dict.fromkeys(heads) if not isinstance(pattern, Skip)]
    orders = [order or choose_order(pattern, layout, block_q=block_q, block_k=block_k) for pattern in groups]
    rows, cols, tile, tiles = [_none(device)], [_none(device)], [_none(device)], []
    first_tile = 0
    for group, (pattern, own) in enumerate(zip(groups, orders, strict=True)):
        q = visual_blocks(layout, own.q, block_q).to(device)
        k = visual_blocks(layout, own.k, block_k).to(device)
        group_rows, group_cols, group_tile, group_tiles = _entries(pattern, layout, q, k)
        rows.append(group_rows + group * (len(q) + _extra_blocks(layout, q)))
        cols.append(group_cols)
        tile.append(torch.where(group_tile == _FULL, _FULL, group_tile + first_tile))
        tiles.append(group_tiles)
        first_tile += len(group_tiles)
    distinct, index = dedupe(torch.cat(tiles)) if tiles else (None, _none(device))
    # The last element is reached by _FULL = -1.
    renumbered = torch.cat([index, index.new_full((1,), _FULL)])[torch.cat(tile)]
    return BlockLists.from_entries(
        q_len=layout.tokens,
        k_len=layout.tokens,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.tensor([groups.index(pattern) if pattern in groups else -1 for pattern in heads]),
        q_order=_table(layout, [own.q for own in orders], block_q),
        k_order=_table(layout, [own.k for own in orders], block_k),
        rows=torch.cat(rows),
        cols=torch.cat(cols),
        tile=renumbered,
        tiles=distinct,
    )


def _entries(pattern: Pattern, layout: Layout, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query block, key block and tile (-1: full) of each visited block of one group, and its tiles."""
    some, every = pattern.cover(q, k, layout.grid)
    full = torch.ones(
        len(q) + _extra_blocks(layout, q), len(k) + _extra_blocks(layout, k), dtype=torch.bool, device=q.device
    )
    full[: len(q), : len(k)] = every
    full_rows, full_cols = full.nonzero(as_tuple=True)
    rows, cols = (some & ~every).nonzero(as_tuple=True)
    tile, tiles = _judge(pattern, layout, q, k, rows, cols)
    seen = tile != _UNSEEN
    return (
        torch.cat([full_rows, rows[seen]]),
        torch.cat([full_cols, cols[seen]]),
        torch.cat([torch.full_like(full_rows, _FULL), tile[seen]]),
        tiles,
    )


def _judge(pattern: Pattern, layout: Layout, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate candidate blocks exactly: int64 [n] tile, `_FULL` or `_UNSEEN` of each, and the tiles."""
    keys = pattern.alike(q, k, rows, cols, layout.grid)
    if keys is not None:
        first, index = first_of(keys)
        tile, tiles = _judge_each(pattern, layout, q, k, rows[first], cols[first])
        return tile[index], tiles
    return _judge_each(pattern, layout, q, k, rows, cols)


def _judge_each(
    pattern: Pattern, layout: Layout, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor]:
    q_real, k_real = real_bits(q, k)
    tile = torch.full_like(rows, _UNSEEN)
    tiles = [torch.zeros(0, q.shape[1], k.shape[1] // 32, dtype=torch.int32, device=q.device)]
    start = first_tile = 0
    for words in block_bits(pattern, layout.grid, q, k, rows, cols):
        part = slice(start, start + len(words))
        whole = k_real[cols[part]][:, None].where(q_real[rows[part]][..., None], 0)
        full = (words == whole).flatten(1).all(1)
        masked = (words != 0).flatten(1).any(1) & ~full
        distinct, index = dedupe(words[masked])
        tile[part][full] = _FULL
        tile[part][masked] = index + first_tile
        tiles.append(distinct)
        first_tile += len(distinct)
        start += len(words)
    return tile, torch.cat(tiles)


def _extra_blocks(layout: Layout, blocks: Tensor) -> int:
    return -(-layout.extra // blocks.shape[1])


def _table(layout: Layout, tiles: Sequence[Tile | None], block: int) -> Tensor:
    """Stack the orders of the groups; one row where they are all the same."""
    tables = {tile: order_table(layout, tile, block) for tile in tiles}
    if len(tables) <= 1:
        return next(iter(tables.values()), order_table(layout, None, block))[None]
    return torch.stack([tables[tile] for tile in tiles])


def _none(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)
