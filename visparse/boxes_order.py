"""Which boxes to take: the ones that make a query visit the fewest blocks."""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from visparse.boxes import box_shapes, inward_tiles, runs_of, tiles_of
from visparse.boxes_axis import Spans, cut_spans, spans_of
from visparse.layout import Grid, Layout
from visparse.order import Order, Tile
from visparse.patterns.base import Pattern

_PARTIAL = 1.1  # cost of a masked block; a full one costs 1
_SAMPLE = 256  # query blocks that are looked at where blocks have to be compared one by one


@lru_cache(maxsize=256)
def choose_boxes(pattern: Pattern, layout: Layout, *, block_q: int, block_k: int, device: torch.device) -> Order:
    """Return the boxes, or runs, with the lowest cost.

    The cost is the number of visited blocks, masked ones counted 1.1 times; query tiles that hang over the end of the
    grid count as whole ones. It is exact for patterns with `Pattern.axes`, where key boxes may begin anywhere. For
    other patterns it is estimated by `Pattern.cover` on a sample of query blocks. A tie goes to runs.

    Args:
        pattern: what is kept.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        device: where blocks are compared.

    Returns:
        The order; None in it means runs.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    grid = layout.grid
    q_boxes, k_boxes = box_shapes(grid, block_q, queries=True), box_shapes(grid, block_k, queries=False)
    extra = -(-layout.before // block_k) - (-layout.after // block_k)
    cover_cost = _cover_cost(pattern, grid, block_q, block_k, device)

    def cost(order: Order, sampled: bool = False) -> float:
        return cover_cost(order, sampled) + _blocks(grid, order.q, block_q) * extra

    def estimate(order: Order) -> float:
        return cost(order, sampled=True)

    tables = pattern.axes(grid)
    if tables is None or not q_boxes or not k_boxes:
        best = min([Order(), *(Order(q, k) for q, k in product(q_boxes, k_boxes) if _similar(q, k))], key=estimate)
        best = min([best, *(Order(q, best.k) for q in q_boxes)], key=estimate)
        best = min([best, *(Order(best.q, k) for k in k_boxes)], key=estimate)
        return min([Order(), best], key=cost)
    of_windows = _windows_cost(tables)

    def window_cost(pair: tuple[Tile, Tile]) -> float:
        return of_windows(*pair) + _blocks(grid, pair[0], block_q) * extra

    best_pair = min(product(q_boxes, k_boxes), key=window_cost)
    runs = min([Order(), Order(best_pair[0])], key=cost)
    return runs if cost(runs) <= window_cost(best_pair) else Order(*best_pair)


def _windows_cost(tables: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tile, Tile], float]:
    """Cost of boxes that begin with the windows: a product over the axes, so no block is looked at."""

    @cache
    def spans(axis: int, q_side: int) -> Spans:
        return spans_of(tables[axis], q_side)

    @cache
    def counts(axis: int, q_side: int, k_side: int) -> tuple[int, int]:
        cut = cut_spans(spans(axis, q_side), k_side)
        return int(cut.seen.sum()), int(cut.full.sum())

    def cost(q: Tile, k: Tile) -> float:
        by_axis = [counts(axis, q[axis], k[axis]) for axis in range(3)]
        seen, full = (prod(numbers) for numbers in zip(*by_axis, strict=True))
        return full + _PARTIAL * (seen - full)

    return cost


def _cover_cost(
    pattern: Pattern, grid: Grid, block_q: int, block_k: int, device: torch.device
) -> Callable[[Order, bool], float]:
    """Cost of aligned boxes and runs, by `Pattern.cover` on all query blocks or on a sample of them."""

    @cache
    def queries(box: Tile | None) -> Tensor:
        side = runs_of(0, prod(grid), block_q, device) if box is None else tiles_of(grid, 0, box, device)
        return side.tokens.long()

    @cache
    def keys(box: Tile | None) -> Tensor:
        if box is None:
            return runs_of(0, prod(grid), block_k, device).tokens.long()
        return inward_tiles(grid, 0, box, device)[1].long()

    @cache
    def cost(order: Order, sampled: bool) -> float:
        q = queries(order.q)
        total = len(q)
        if sampled and total > _SAMPLE:
            # Random places: even steps would see only some places of a grid.
            q = q[torch.randperm(total, generator=torch.Generator().manual_seed(0))[:_SAMPLE].to(device)]
        some, every = pattern.cover(q, keys(order.k), grid)
        seen, full = torch.stack([some.sum(), (some & every).sum()]).tolist()
        return (full + _PARTIAL * (seen - full)) * total / len(q)

    return cost


def _blocks(grid: Grid, box: Tile | None, block: int) -> int:
    if box is None:
        return -(-prod(grid) // block)
    return prod(-(-length // side) for length, side in zip(grid, box, strict=True))


def _similar(q: Tile, k: Tile) -> bool:
    """Whether two boxes differ in one axis at most."""
    return sum(a != b for a, b in zip(q, k, strict=True)) <= 1
