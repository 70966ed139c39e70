"""Compile patterns to block lists."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from visparse.boxes_order import choose_boxes
from visparse.compile_bits import FULL, number_tiles
from visparse.compile_blocks import block_entries
from visparse.compile_boxes import compile_boxes
from visparse.errors import nearest
from visparse.layout import Layout
from visparse.order import NAMES, Order, Tile, choose_order, order_table, visual_blocks
from visparse.order_curves import CURVES
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
    boxes: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLists:
    """Turn one pattern per head into block lists; the last 32 results are cached.

    Heads with equal patterns share a group. Extra tokens see everything and are seen by everything, except in skipped
    heads.

    Besides the lists themselves, memory goes to a few numbers for each pair of blocks, and to the masks that are worked
    on at a time: below 0.4 GB for 118,800 tokens in blocks of 128. An accelerator works on 16 times larger parts, which
    take up to 0.5 GB more.

    Args:
        patterns: one per head.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block, a multiple of 32.
        order: ``"auto"`` (for each group what visits the fewest blocks), ``"row-major"`` (or ``"frame-major"``, the
            same), ``"pixel-major"``, ``"z-order"``, ``"hilbert"``, a tile (frames, height, width) for queries and keys,
            or an `Order`. `orders_of` says what was taken.
        boxes: whether every block is a box of the grid or a run of tokens, so that it can be fetched from row-major
            memory; the lists then have `BlockLists.boxes`. Tiles in ``order`` are boxes, ``"row-major"`` means runs,
            and curves are errors.
            Key boxes of patterns with `Pattern.axes` begin wherever a window begins; those of other patterns are
            aligned.
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
    return _compile(heads, layout, block_q, block_k, parse_order(order, boxes), boxes, torch.device(device))


def orders_of(
    patterns: Sequence[Pattern],
    layout: Layout,
    *,
    block_q: int,
    block_k: int,
    order: str | Tile | Order = "auto",
    boxes: bool = False,
    device: torch.device | str = "cpu",
) -> list[Order | None]:
    """Return the order that `compile_lists` takes for each head; ``str()`` of it says it in words.

    Args:
        patterns: as in `compile_lists`, and so are the others.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        order: what is asked for.
        boxes: whether tiles are boxes, and row-major means runs.
        device: where blocks are compared.

    Returns:
        The order of each head; None for a skipped one.

    Raises:
        ValueError: a bad order, or a pattern that does not fit the grid.
    """
    given = parse_order(order, boxes)
    return [
        None if isinstance(pattern, Skip) else given or _auto(pattern, layout, block_q, block_k, boxes, device)
        for pattern in patterns
    ]


def parse_order(order: str | Tile | Order, boxes: bool) -> Order | None:
    """Read the ``order`` of `compile_lists`.

    Args:
        order: a name, a tile or an `Order`.
        boxes: whether tiles are boxes, and row-major means runs.

    Returns:
        The order; None where it is to be chosen.

    Raises:
        ValueError: an unknown name, a bad tile, or a curve with boxes.
    """
    if isinstance(order, str):
        if order not in NAMES:
            raise ValueError(
                "order: wanted 'auto', 'row-major', a tile such as (4, 4, 4), an Order, or one of "
                f"{', '.join(NAMES[2:])}; got {order!r}; use 'auto' if unsure{nearest(order, NAMES)}"
            )
        if order == "auto":
            return None
        order = Order(curve=order) if order in CURVES else Order()
    elif not isinstance(order, Order):
        order = Order(order, order)
    if boxes and order.curve is not None:
        raise ValueError(
            f"order: with boxes=True wanted tiles or row-major, got the curve {order.curve!r}, whose blocks are "
            "neither boxes nor runs; use boxes=False, or order='auto'"
        )
    return order


def _auto(
    pattern: Pattern, layout: Layout, block_q: int, block_k: int, boxes: bool, device: torch.device | str
) -> Order:
    choose = choose_boxes if boxes else choose_order
    return choose(pattern, layout, block_q=block_q, block_k=block_k, device=torch.device(device))


def clear_cache() -> None:
    """Forget the lists that were compiled and the orders that were chosen, to free memory or to measure."""
    _compile.cache_clear()
    choose_boxes.cache_clear()
    choose_order.cache_clear()


@lru_cache(maxsize=32)
def _compile(
    heads: tuple[Pattern, ...],
    layout: Layout,
    block_q: int,
    block_k: int,
    order: Order | None,
    boxes: bool,
    device: torch.device,
) -> BlockLists:
    groups = [pattern for pattern in dict.fromkeys(heads) if not isinstance(pattern, Skip)]
    head_group = torch.tensor([groups.index(pattern) if pattern in groups else -1 for pattern in heads])
    if boxes:
        return compile_boxes(groups, head_group, layout, block_q=block_q, block_k=block_k, order=order, device=device)
    orders = [order or _auto(pattern, layout, block_q, block_k, boxes, device) for pattern in groups]
    rows, cols, tile, tiles = [_none(device)], [_none(device)], [], []
    for group, (pattern, own) in enumerate(zip(groups, orders, strict=True)):
        q = visual_blocks(layout, own.of_q, block_q, device)
        k = visual_blocks(layout, own.of_k, block_k, device)
        group_rows, group_cols, group_tile, group_tiles = _with_extra(
            *block_entries(pattern, layout.grid, q, k), layout, q, k
        )
        rows.append(group_rows + group * (len(q) + _extra_blocks(layout, q)))
        cols.append(group_cols)
        tile.append(group_tile)
        tiles.append(group_tiles)
    numbers, distinct = number_tiles(tile, tiles) if groups else (_none(device), None)
    return BlockLists.from_entries(
        q_len=layout.tokens,
        k_len=layout.tokens,
        block_q=block_q,
        block_k=block_k,
        head_group=head_group,
        q_order=_table(layout, [own.of_q for own in orders], block_q, device),
        k_order=_table(layout, [own.of_k for own in orders], block_k, device),
        rows=torch.cat(rows),
        cols=torch.cat(cols),
        tile=numbers,
        tiles=distinct,
    )


def _with_extra(
    rows: Tensor, cols: Tensor, tile: Tensor, tiles: Tensor, layout: Layout, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the blocks of extra tokens, which see everything and are seen by everything."""
    extra = torch.ones(
        len(q) + _extra_blocks(layout, q), len(k) + _extra_blocks(layout, k), dtype=torch.bool, device=q.device
    )
    extra[: len(q), : len(k)] = False
    extra_rows, extra_cols = extra.nonzero(as_tuple=True)
    tile = torch.cat([tile, torch.full_like(extra_rows, FULL)])
    return torch.cat([rows, extra_rows]), torch.cat([cols, extra_cols]), tile, tiles


def _extra_blocks(layout: Layout, blocks: Tensor) -> int:
    return -(-layout.extra // blocks.shape[1])


def _table(layout: Layout, tiles: Sequence[Tile | str | None], block: int, device: torch.device) -> Tensor:
    """Stack the orders of the groups; one row where they are all the same."""
    tables = {tile: order_table(layout, tile, block, device) for tile in dict.fromkeys(tiles or [None])}
    if len(tables) == 1:
        return next(iter(tables.values()))[None]
    return torch.stack([tables[tile] for tile in tiles])


def _none(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)
