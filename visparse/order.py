"""Token order: which token lies in which slot."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from visparse.errors import nearest
from visparse.layout import Grid, Layout, coordinates
from visparse.order_curves import CURVES, curve_order
from visparse.patterns.base import Pattern

Tile = tuple[int, int, int]

ROW_MAJOR = ("row-major", "frame-major")
"""Names of the order of the sequence itself."""

NAMES = ("auto", *ROW_MAJOR, *CURVES)
"""All names that `visparse.compile.compile_lists` takes."""

_CURVE_GAIN = 0.95


@dataclass(frozen=True)
class Order:
    """Orders of queries and keys; they need not be the same.

    Args:
        q: tile (frames, height, width) of the query order, in tokens; None for row-major.
        k: the same for keys.
        curve: a curve for both, instead of tiles: ``"pixel-major"``, ``"z-order"`` or ``"hilbert"``.

    Raises:
        ValueError: a tile is not three positive ints, or the curve is unknown or given together with a tile.
    """

    q: Tile | None = None
    k: Tile | None = None
    curve: str | None = None

    def __post_init__(self) -> None:
        """Check the tiles and the name."""
        if self.curve is not None and self.curve not in CURVES:
            raise ValueError(
                f"order: wanted a curve of {', '.join(CURVES)}, got {self.curve!r}{nearest(str(self.curve), CURVES)}"
            )
        if self.curve is not None and (self.q, self.k) != (None, None):
            raise ValueError(
                f"order: wanted a curve or tiles, got the curve {self.curve!r} and the tiles {self.q} and {self.k}; "
                "leave one of them out"
            )
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

    @property
    def of_q(self) -> Tile | str | None:
        """How queries are ordered, as `order_table` takes it."""
        return self.curve or self.q

    @property
    def of_k(self) -> Tile | str | None:
        """How keys are ordered, as `order_table` takes it."""
        return self.curve or self.k

    def __str__(self) -> str:
        """The order in words."""
        if self.curve is not None:
            return self.curve
        q, k = ("row-major" if tile is None else "x".join(map(str, tile)) for tile in (self.q, self.k))
        if q == k:
            return q if self.q is None else f"tiles {q}"
        return f"queries {q}, keys {k}"


def order_table(layout: Layout, tile: Tile | str | None, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the slot -> token table of one order.

    The tokens of the grid come first, then all extra tokens in blocks of their own. Both parts are padded to whole
    blocks, so every order of a layout has the same, smallest number of slots.

    Tiled order: whole tiles first, in row-major order of tiles, so that they stay aligned with the blocks. The ragged
    tiles at the ends of axes follow, grouped by the axes that cut them; in each group the pieces have one shape, and
    they are packed without gaps.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) in tokens, a name of `order_curves.CURVES`, or None for row-major.
        block: slots per block.
        device: where the table is built.

    Returns:
        int32 [slots], a multiple of ``block`` long; -1 is padding.
    """
    visual = _grid_order(layout.grid, tile, device) + layout.before
    before = torch.arange(layout.before, device=device)
    after = torch.arange(layout.after, device=device) + layout.before + layout.visual
    return torch.cat([pad_tokens(visual, block), pad_tokens(torch.cat([before, after]), block)]).to(torch.int32)


def visual_blocks(layout: Layout, tile: Tile | str | None, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the tokens of the grid by block, as row-major indices inside the grid.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) in tokens, a name of `order_curves.CURVES`, or None for row-major.
        block: slots per block.
        device: where the table is built.

    Returns:
        int64 [blocks, block]; -1 is padding.
    """
    return pad_tokens(_grid_order(layout.grid, tile, device), block).view(-1, block)


@lru_cache(maxsize=256)
def choose_order(
    pattern: Pattern, layout: Layout, *, block_q: int, block_k: int, device: torch.device | str = "cpu"
) -> Order:
    """Return the order that visits the fewest blocks, as far as `Pattern.cover` tells: `best_of` `try_orders`.

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
    return best_of(try_orders(pattern, layout, block_q=block_q, block_k=block_k, device=device))


def best_of(visited: Mapping[Order, int]) -> Order:
    """Return the order with the fewest visited blocks.

    A tie goes to the first. A curve has to visit 5 % fewer blocks than the best tiles: few of its masks are equal, so
    its lists are larger and take longer to make.

    Args:
        visited: order -> visited blocks, as `try_orders` gives it.
    """
    return min(visited, key=lambda order: visited[order] / (1 if order.curve is None else _CURVE_GAIN))


def try_orders(
    pattern: Pattern, layout: Layout, *, block_q: int, block_k: int, device: torch.device | str = "cpu"
) -> dict[Order, int]:
    """Count the blocks that are visited in many orders.

    Tried are row-major and compact tiles of about one block: first with one shape for queries and keys, then with
    other shapes for the queries, then for the keys, around the best so far; then the curves.

    Args:
        pattern: what is kept.
        layout: grid and extra tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        device: where blocks are compared.

    Returns:
        Order -> visited blocks between tokens of the grid, as far as `Pattern.cover` tells (never too few), in the
        order in which they were tried.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    q_blocks = {tile: visual_blocks(layout, tile, block_q, device) for tile in _candidates(layout.grid, block_q)}
    k_blocks = {tile: visual_blocks(layout, tile, block_k, device) for tile in _candidates(layout.grid, block_k)}
    visited: dict[Order, int] = {}

    def look(order: Order, q: Tensor, k: Tensor) -> None:
        if order not in visited:
            visited[order] = int(pattern.cover(q, k, layout.grid)[0].sum())

    look(Order(), q_blocks[None], k_blocks[None])
    for q, k in product(q_blocks, k_blocks):
        if q and k and q[:2] == k[:2]:
            look(Order(q, k), q_blocks[q], k_blocks[k])
    best = min(visited, key=visited.__getitem__)
    for q in q_blocks:
        look(Order(q, best.k), q_blocks[q], k_blocks[best.k])
    best = min(visited, key=visited.__getitem__)
    for k in k_blocks:
        look(Order(best.q, k), q_blocks[best.q], k_blocks[k])
    for curve in _curves(layout.grid):
        blocks = (visual_blocks(layout, curve, block, device) for block in (block_q, block_k))
        look(Order(curve=curve), *blocks)
    return visited


def _curves(grid: Grid) -> list[str]:
    """Curves that differ from row-major."""
    turning = sum(length > 1 for length in grid) > 1
    return [curve for curve in CURVES if turning and (curve != "pixel-major" or grid[0] > 1)]


def _candidates(grid: Grid, block: int) -> list[Tile | None]:
    """Row-major, then tiles of one block whose height and width differ by a factor of at most 4.

    A tile through all frames is among them, because many windows span them all; so are tiles of 3 frames where the
    block has that factor. Where the width is no whole number, or more than the grid has, tiles are one token wide:
    blocks then run along a strip of them.
    """
    tiles: list[Tile | None] = [None]
    usual = (1, 2, 4) if block % 3 else (1, 2, 3, 4)
    all_frames = sorted({*(min(frames, grid[0]) for frames in usual), grid[0]})
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


def _grid_order(grid: Grid, tile: Tile | str | None, device: torch.device | str) -> Tensor:
    if isinstance(tile, str):
        return curve_order(tile, grid, device)
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


def pad_tokens(tokens: Tensor, block: int) -> Tensor:
    """Fill a list of tokens up with -1, padding, to a multiple of ``block``."""
    return torch.cat([tokens, tokens.new_full((-len(tokens) % block,), -1)])
