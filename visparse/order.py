"""Token order: which token lies in which slot."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from visparse.layout import Grid, Layout, coordinates
from visparse.patterns.base import Pattern

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class Order:
    """Orders of queries and keys; they need not be the same.

    Args:
        q: tile (frames, height, width) of the query order, in tokens; None for row-major.
        k: the same for keys.

    Raises:
        ValueError: a tile is not three positive ints.
    """

    q: Tile | None = None
    k: Tile | None = None

    def __post_init__(self) -> None:
        """Check the tiles."""
        for name in ("q", "k"):
            tile = getattr(self, name)
            if tile is None:
                continue
            tile = tuple(tile)
            if len(tile) != 3 or not all(type(size) is int and size > 0 for size in tile):
                raise ValueError(
                    f"order: wanted a tile of three positive ints (frames, height, width), got {tile}; "
                    "for example (4, 4, 4)"
                )
            object.__setattr__(self, name, tile)


def order_table(layout: Layout, tile: Tile | None, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the slot -> token table of one order.

    The tokens of the grid come first, then all extra tokens in blocks of their own. Both parts are padded to whole
    blocks, so every order of a layout has the same, smallest number of slots.

    Tiled order: whole tiles first, in row-major order of tiles, so that they stay aligned with the blocks. The ragged
    tiles at the ends of axes follow, grouped by the axes that cut them; in each group the pieces have one shape, and
    they are packed without gaps.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) in tokens, or None for row-major.
        block: slots per block.
        device: where the table is built.

    Returns:
        int32 [slots], a multiple of ``block`` long; -1 is padding.
    """
    visual = _grid_order(layout.grid, tile, device) + layout.before
    before = torch.arange(layout.before, device=device)
    after = torch.arange(layout.after, device=device) + layout.before + layout.visual
    return torch.cat([_pad(visual, block), _pad(torch.cat([before, after]), block)]).to(torch.int32)


def visual_blocks(layout: Layout, tile: Tile | None, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the tokens of the grid by block, as row-major indices inside the grid.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) in tokens, or None for row-major.
        block: slots per block.
        device: where the table is built.

    Returns:
        int64 [blocks, block]; -1 is padding.
    """
    return _pad(_grid_order(layout.grid, tile, device), block).view(-1, block)


def choose_order(
    pattern: Pattern, layout: Layout, *, block_q: int, block_k: int, device: torch.device | str = "cpu"
) -> Order:
    """Return the order that visits the fewest blocks, as far as `Pattern.cover` tells.

    Tried are row-major and compact tiles of about one block: first with one shape for queries and keys, then with
    other shapes for the queries, then for the keys. A tie goes to row-major, then to the first tried.

    Args:
        pattern: what is kept.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        device: where blocks are compared.

    Returns:
        The order.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    q_blocks = {tile: visual_blocks(layout, tile, block_q, device) for tile in _candidates(layout.grid, block_q)}
    k_blocks = {tile: visual_blocks(layout, tile, block_k, device) for tile in _candidates(layout.grid, block_k)}

    @cache
    def visited(order: Order) -> int:
        some, _ = pattern.cover(q_blocks[order.q], k_blocks[order.k], layout.grid)
        return int(some.sum())

    shared = [Order(q, k) for q, k in product(q_blocks, k_blocks) if q and k and q[:2] == k[:2]]
    best = min([Order(), *shared], key=visited)
    best = min([best, *(Order(q, best.k) for q in q_blocks)], key=visited)
    return min([best, *(Order(best.q, k) for k in k_blocks)], key=visited)


def _candidates(grid: Grid, block: int) -> list[Tile | None]:
    """Row-major, then tiles of one block whose height and width differ by a factor of at most 4.

    A tile through all frames is among them, because many windows span them all. Where the width is no whole number,
    or more than the grid has, tiles are one token wide: blocks then run along a strip of them.
    """
    tiles: list[Tile | None] = [None]
    all_frames = sorted({1, min(2, grid[0]), min(4, grid[0]), grid[0]})
    all_heights = sorted({min(height, grid[1]) for height in (1, 2, 4, 8, 16)})
    for frames, height in product(all_frames, all_heights):
        area = frames * height
        if area > block or not area * height <= 4 * block <= 16 * area * height:
            continue
        whole = block % area == 0 and block // area <= grid[2]
        tile = (frames, height, block // area if whole else 1)
        if tile != (1, 1, 1):
            tiles.append(tile)
    return tiles


def _grid_order(grid: Grid, tile: Tile | None, device: torch.device | str) -> Tensor:
    index = torch.arange(prod(grid), device=device)
    if tile is None:
        return index
    at = coordinates(index, grid)
    size, length = torch.tensor(tile, device=device), torch.tensor(grid, device=device)
    cut = (at // size + 1) * size > length
    digits = [*cut.unbind(-1), *(at // size).unbind(-1), *(at % size).unbind(-1)]
    bases = [2, 2, 2, *(-(-axis // side) for axis, side in zip(grid, tile, strict=True)), *tile]
    key = torch.zeros_like(index)
    for digit, base in zip(digits, bases, strict=True):
        key = key * base + digit
    return key.argsort()


def _pad(tokens: Tensor, block: int) -> Tensor:
    return torch.cat([tokens, tokens.new_full((-len(tokens) % block,), -1)])
