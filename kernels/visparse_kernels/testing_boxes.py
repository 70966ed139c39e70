"""Random block lists whose blocks are boxes of a grid, for the tests of implementations that fetch boxes."""

from itertools import product
from math import prod

import torch
from torch import Tensor

from visparse_kernels.boxes import Box, Boxes, box_tokens
from visparse_kernels.lists import BlockLists


def random_boxed_lists(
    *,
    grid: Box,
    q_box: Box | list[Box | None],
    k_box: Box | list[Box | None],
    head_group: list[int],
    before: int = 0,
    after: int = 0,
    keep: float = 0.4,
    partial: float = 0.5,
    seed: int = 0,
    validate: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLists:
    """Make random lists over a grid with extra tokens: aligned query boxes, key boxes from a lattice of any origin.

    Query boxes at the end of an axis hang over it; key boxes too. The extra tokens are runs, and so is everything in a
    group whose box is None. Some rows are empty, and so are those of query blocks without a token.

    Args:
        grid: (frames, height, width), in tokens.
        q_box: shape of the query boxes, for all groups or one per group; None: runs.
        k_box: the same for keys.
        head_group: group of each head, -1 for a skipped head.
        before: tokens before the grid.
        after: tokens behind it.
        keep: share of blocks that are visited.
        partial: share of these that have a mask.
        seed: of the generator.
        validate: check the contents, which is slow for long sequences.
        device: where the lists live.
    """
    make = torch.Generator().manual_seed(seed)
    groups = max(head_group) + 1
    q_boxes = q_box if isinstance(q_box, list) else [q_box] * groups
    k_boxes = k_box if isinstance(k_box, list) else [k_box] * groups
    block_q, block_k = (next(prod(box) for box in boxes if box is not None) for boxes in (q_boxes, k_boxes))
    length = before + prod(grid) + after
    lattice = [int(torch.randint(0, side, (1,), generator=make)) for side in grid]
    q = [_table(grid, before, after, box, block_q, (0, 0, 0)) for box in q_boxes]
    k = [_table(grid, before, after, box, block_k, (lattice[0], lattice[1], lattice[2])) for box in k_boxes]
    (q_order, q_starts), (k_order, k_starts) = _stack(q, block_q), _stack(k, block_k)
    n_q, n_k = q_starts.shape[1], k_starts.shape[1]
    kept = torch.rand(groups * n_q, n_k, generator=make) < keep
    kept[:: max(2, n_q // 2)] = False
    kept &= (q_order.view(-1, block_q) >= 0).any(1)[:, None]
    rows, cols = kept.nonzero(as_tuple=True)
    tiles = torch.randint(-(2**31), 2**31, (7, block_q, block_k // 32), generator=make).to(torch.int32)
    masked = torch.rand(rows.shape[0], generator=make) < partial
    boxes = Boxes(
        grid=grid, first=before, q_box=tuple(q_boxes), k_box=tuple(k_boxes), q_starts=q_starts, k_starts=k_starts
    )
    lists = BlockLists.from_entries(
        q_len=length,
        k_len=length,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.tensor(head_group),
        q_order=q_order,
        k_order=k_order,
        rows=rows,
        cols=cols,
        tile=torch.where(masked, torch.randint(0, 7, rows.shape, generator=make), -1),
        tiles=tiles,
        boxes=boxes,
    )
    return (lists.validate() if validate else lists).to(device)


def _table(grid: Box, before: int, after: int, box: Box | None, block: int, origin: Box) -> tuple[Tensor, Tensor]:
    """Tokens [n, block] and starts [n, 3] of one group."""
    first = [*range(before, before + prod(grid), block)] if box is None else []
    ends = [before + prod(grid)] * len(first)
    for start, end in ((0, before), (before + prod(grid), before + prod(grid) + after)):
        first += range(start, end, block)
        ends += [end] * len(range(start, end, block))
    starts = torch.tensor([[-1, 0, token] for token in first], dtype=torch.int32).view(-1, 3)
    token = starts[:, 2:] + torch.arange(block, dtype=torch.int32)
    tokens = torch.where(token < torch.tensor(ends, dtype=torch.int32).view(-1, 1), token, -1)
    if box is None:
        return tokens, starts
    at = product(*(range(o % side, length, side) for o, side, length in zip(origin, box, grid, strict=True)))
    box_starts = torch.tensor(list(at), dtype=torch.int32).view(-1, 3)
    return (
        torch.cat([box_tokens(grid, before, box, box_starts), tokens]),
        torch.cat([box_starts, starts]),
    )


def _stack(tables: list[tuple[Tensor, Tensor]], block: int) -> tuple[Tensor, Tensor]:
    """Tables of all groups, padded to one length with runs that hold nothing."""
    n = max(len(tokens) for tokens, _ in tables)
    orders, starts = [], []
    for tokens, start in tables:
        more = n - len(tokens)
        orders.append(torch.cat([tokens, tokens.new_full((more, block), -1)]).flatten())
        starts.append(torch.cat([start, torch.tensor([[-1, 0, 0]], dtype=torch.int32).expand(more, 3)]))
    return torch.stack(orders), torch.stack(starts)
