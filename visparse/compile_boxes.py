"""Compile patterns to block lists whose blocks are boxes of the grid or runs of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visparse.boxes import Side, check_shape, inward_tiles, runs_of, tiles_of
from visparse.boxes_order import choose_boxes
from visparse.compile_bits import FULL, number_tiles
from visparse.compile_blocks import block_entries
from visparse.compile_windows import window_entries
from visparse.layout import Layout
from visparse.order import Order
from visparse.patterns.base import Pattern
from visparse_kernels.boxes import Boxes, box_tokens
from visparse_kernels.lists import BlockLists


class _Group(NamedTuple):
    q: Side
    k: Side
    rows: Tensor  # int64 [n], query block of each visited block
    cols: Tensor  # int64 [n], its key block
    tile: Tensor  # int64 [n], its mask, -1 where it is full
    tiles: Tensor  # int32 [n_tiles, block_q, block_k / 32]


def compile_boxes(
    groups: Sequence[Pattern],
    head_group: Tensor,
    layout: Layout,
    *,
    block_q: int,
    block_k: int,
    order: Order | None,
    device: torch.device,
) -> BlockLists:
    """Build block lists with `Boxes`.

    Args:
        groups: pattern of each group of heads.
        head_group: int64 [H], group of each head, -1 for a skipped one.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        order: shapes of the boxes, None in it for runs; None chooses for each group.
        device: where the lists are built and live.

    Returns:
        The lists.

    Raises:
        ValueError: a box cannot be fetched, or a pattern does not fit the grid.
    """
    if order is not None:
        for name, box, block in (("q", order.q, block_q), ("k", order.k, block_k)):
            if box is not None:
                check_shape(name, box, block, layout.grid)
    built = [
        _group(
            pattern,
            layout,
            order or choose_boxes(pattern, layout, block_q=block_q, block_k=block_k, device=device),
            block_q,
            block_k,
            device,
        )
        for pattern in groups
    ]
    all_q = [group.q for group in built] or [runs_of(0, layout.tokens, block_q, device)]
    all_k = [group.k for group in built] or [runs_of(0, layout.tokens, block_k, device)]
    q_box, q_starts, q_order = _stack(all_q)
    k_box, k_starts, k_order = _stack(all_k)
    n_q = q_starts.shape[1]
    none = [torch.zeros(0, dtype=torch.int64, device=device)]
    tile, tiles = none[0], None
    if built:
        tile, tiles = number_tiles([group.tile for group in built], [group.tiles for group in built])
    return BlockLists.from_entries(
        q_len=layout.tokens,
        k_len=layout.tokens,
        block_q=block_q,
        block_k=block_k,
        head_group=head_group,
        q_order=q_order,
        k_order=k_order,
        rows=torch.cat([*none, *(group.rows + number * n_q for number, group in enumerate(built))]),
        cols=torch.cat([*none, *(group.cols for group in built)]),
        tile=torch.cat([*none, tile]),
        tiles=tiles,
        boxes=Boxes(
            grid=layout.grid, first=layout.before, q_box=q_box, k_box=k_box, q_starts=q_starts, k_starts=k_starts
        ),
    )


def _group(pattern: Pattern, layout: Layout, order: Order, block_q: int, block_k: int, device: torch.device) -> _Group:
    grid, first, end = layout.grid, layout.before, layout.before + layout.visual
    runs = runs_of(first, end, block_q, device)
    q = runs if order.q is None else tiles_of(grid, first, order.q, device)
    tables = pattern.axes(grid) if order.q and order.k else None
    if order.q and order.k and tables:
        rows, cols, tile, tiles, starts = window_entries(tables, grid, order.q, order.k, device)
        k = Side(order.k, starts, box_tokens(grid, first, order.k, starts))
    else:
        k = runs_of(first, end, block_k, device)
        owned = k.tokens
        if order.k is not None:
            k, owned = inward_tiles(grid, first, order.k, device)
        q_at, k_at, owned_at = (
            torch.where(tokens < 0, -1, tokens - first).long() for tokens in (q.tokens, k.tokens, owned)
        )
        rows, cols, tile, tiles = block_entries(pattern, grid, q_at, k_at, owned_at)
    return _with_extra(_Group(q, k, rows, cols, tile, tiles), layout, block_q, block_k)


def _with_extra(group: _Group, layout: Layout, block_q: int, block_k: int) -> _Group:
    """Add runs of extra tokens, which see everything and are seen by everything.

    The boxes of keys may overlap and leave tokens out, so extra queries see the grid as runs of its own.
    """
    if layout.extra == 0:
        return group
    device, end = group.rows.device, layout.before + layout.visual
    text_q = [runs_of(0, layout.before, block_q, device), runs_of(end, layout.tokens, block_q, device)]
    text_k = [runs_of(0, layout.before, block_k, device), runs_of(end, layout.tokens, block_k, device)]
    as_runs = [] if group.k.box is None else [runs_of(layout.before, end, block_k, device)]
    q, k = _join(group.q, *text_q), _join(group.k, *text_k, *as_runs)
    n_q, n_k = len(group.q.starts), len(group.k.starts)
    n_text = sum(len(side.starts) for side in text_k)
    visual_rows, text_cols = _all_pairs(0, n_q, n_k, n_k + n_text, device)
    text_rows, all_cols = _all_pairs(n_q, len(q.starts), n_k if as_runs else 0, len(k.starts), device)
    rows = torch.cat([group.rows, visual_rows, text_rows])
    cols = torch.cat([group.cols, text_cols, all_cols])
    tile = torch.cat([group.tile, group.tile.new_full((len(rows) - len(group.tile),), FULL)])
    return _Group(q, k, rows, cols, tile, group.tiles)


def _all_pairs(first: int, last: int, first_col: int, last_col: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(
        torch.arange(first, last, device=device), torch.arange(first_col, last_col, device=device)
    )
    rows, cols = pairs.view(-1, 2).unbind(1)
    return rows, cols


def _join(side: Side, *runs: Side) -> Side:
    sides = (side, *runs)
    return Side(side.box, torch.cat([part.starts for part in sides]), torch.cat([part.tokens for part in sides]))


def _stack(sides: Sequence[Side]) -> tuple[tuple[tuple[int, int, int] | None, ...], Tensor, Tensor]:
    """Put the blocks of the groups into tables; one row where all are equal, else padded with unused blocks.

    Returns:
        Box of each row, ``starts`` int32 [rows, n, 3] and ``order`` int32 [rows, n * block].
    """
    one = sides[0]
    if all(side.box == one.box and torch.equal(side.starts, one.starts) for side in sides[1:]):
        sides = [one]
    blocks = max(len(side.starts) for side in sides)
    starts, orders = [], []
    for side in sides:
        missing = blocks - len(side.starts)
        unused = torch.tensor([-1, 0, 0], device=side.starts.device).expand(missing, 3)
        starts.append(torch.cat([side.starts, unused]).to(torch.int32))
        orders.append(torch.cat([side.tokens, side.tokens.new_full((missing, side.tokens.shape[1]), -1)]).flatten())
    return tuple(side.box for side in sides), torch.stack(starts), torch.stack(orders)
