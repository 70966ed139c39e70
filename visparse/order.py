"""Token order: which token lies in which slot."""

from dataclasses import dataclass
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


def order_table(layout: Layout, tile: Tile | None, block: int) -> Tensor:
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

    Returns:
        int32 [slots], a multiple of ``block`` long; -1 is padding.
    """
    visual = _grid_order(layout.grid, tile) + layout.before
    before = torch.arange(layout.before)
    after = torch.arange(layout.after) + layout.before + layout.visual
    return torch.cat([_pad(visual, block), _pad(torch.cat([before, after]), block)]).to(torch.int32)


def visual_blocks(layout: Layout, tile: Tile | None, block: int) -> Tensor:
    """Return the tokens of the grid by block, as row-major indices inside the grid.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) in tokens, or None for row-major.
        block: slots per block.

    Returns:
        int64 [blocks, block]; -1 is padding.
    """
    return _pad(_grid_order(layout.grid, tile), block).view(-1, block)


def choose_order(pattern: Pattern, layout: Layout, *, block_q: int, block_k: int) -> Order:
    """Return the order that visits the fewest blocks.

    Tried, for queries and keys separately: row-major, and the compact tiles whose volume is the block size. A tie goes
    to row-major.

    Args:
        pattern: what is kept.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.

    Returns:
        The order.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    best, fewest = Order(), -1
    q_blocks = {tile: visual_blocks(layout, tile, block_q) for tile in _candidates(layout.grid, block_q)}
    k_blocks = {tile: visual_blocks(layout, tile, block_k) for tile in _candidates(layout.grid, block_k)}
    for q_tile, k_tile in product(q_blocks, k_blocks):
        some, _ = pattern.cover(q_blocks[q_tile], k_blocks[k_tile], layout.grid)
        visited = int(some.sum())
        if fewest < 0 or visited < fewest:
            best, fewest = Order(q_tile, k_tile), visited
    return best


def _candidates(grid: Grid, volume: int) -> list[Tile | None]:
    """Row-major, then the tiles of this volume with frames <= height <= width <= 4 height, cut to the grid."""
    tiles: list[Tile | None] = [None]
    for t in range(1, volume + 1):
        for h in range(t, volume // t + 1):
            w = volume // (t * h)
            if t * h * w != volume or not h <= w <= 4 * h:
                continue
            tile = (min(t, grid[0]), min(h, grid[1]), min(w, grid[2]))
            if prod(tile) > 1 and tile not in tiles:
                tiles.append(tile)
    return tiles


def _grid_order(grid: Grid, tile: Tile | None) -> Tensor:
    index = torch.arange(prod(grid))
    if tile is None:
        return index
    at = coordinates(index, grid)
    size, length = torch.tensor(tile), torch.tensor(grid)
    cut = (at // size + 1) * size > length
    digits = [*cut.unbind(-1), *(at // size).unbind(-1), *(at % size).unbind(-1)]
    bases = [2, 2, 2, *(-(-length // size)).tolist(), *tile]
    key = torch.zeros_like(index)
    for digit, base in zip(digits, bases, strict=True):
        key = key * base + digit
    return key.argsort()


def _pad(tokens: Tensor, block: int) -> Tensor:
    return torch.cat([tokens, tokens.new_full((-len(tokens) % block,), -1)])
