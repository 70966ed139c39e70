"""Boxes: blocks that hardware can fetch from row-major memory, and where they lie.

The shapes are those that 5-D copies of the Hopper kernel can serve. A side is a power of two, at most 256. A query box
may have one factor 3, in its slowest axis that is longer than 1, because the kernel cuts it there into parts of 64.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from visparse.layout import Grid
from visparse.order import Tile
from visparse_kernels.boxes import box_tokens

_LONGEST = 256  # tokens on a side of a box


class Side(NamedTuple):
    """Blocks of queries or of keys, in the order of their numbers."""

    box: Tile | None  # shape of the blocks that are boxes; None where all are runs
    starts: Tensor  # int64 [n, 3], origin (frame, row, column); (-1, 0, token) is a run
    tokens: Tensor  # int32 [n, block], token of each slot; -1 is padding


def box_shapes(grid: Grid, block: int, *, queries: bool) -> list[Tile]:
    """List the shapes of boxes that suit a grid.

    Args:
        grid: (frames, height, width), in tokens.
        block: tokens of a box.
        queries: whether they are query boxes, which may hang over the end of the grid and may have a factor 3; a key
            box has to fit into the grid.

    Returns:
        Shapes (frames, height, width), those with the fewest frames first; none where no shape is allowed.
    """
    shapes = []
    for frames in _divisors(block):
        for height in _divisors(block // frames):
            box = frames, height, block // frames // height
            limits = [2 * length - 1 if queries else length for length in grid]
            fits = all(side <= limit for side, limit in zip(box, limits, strict=True))
            if fits and _fetchable(box, queries):
                shapes.append(box)
    return shapes


def check_shape(name: str, box: Tile, block: int, grid: Grid) -> None:
    """Raise where a box is not one that can be fetched.

    Args:
        name: ``"q"`` or ``"k"``.
        box: (frames, height, width), in tokens.
        block: tokens of a box.
        grid: (frames, height, width), in tokens.

    Raises:
        ValueError: it has another number of tokens, a side that is not allowed, or, for keys, exceeds the grid.
    """
    if prod(box) != block:
        raise ValueError(
            f"order: with boxes=True wanted a {name} tile of block_{name} = {block} tokens, got {box}, which has "
            f"{prod(box)}; change its sides, or use order='auto'"
        )
    if not _fetchable(box, name == "q"):
        raise ValueError(
            f"order: with boxes=True wanted a {name} tile whose sides are powers of two up to {_LONGEST} (the slowest "
            f"axis of a query tile that is longer than 1 may have one factor 3), got {box}; use order='auto'"
        )
    if name == "k" and any(side > length for side, length in zip(box, grid, strict=True)):
        raise ValueError(
            f"order: with boxes=True wanted a k tile inside the grid {grid}, got {box}; use order='auto', "
            "or None for runs"
        )


def tiles_of(grid: Grid, first: int, box: Tile, device: torch.device) -> Side:
    """Lay boxes over the grid as tiles; the last of an axis hang over its end with padding.

    Args:
        grid: (frames, height, width), in tokens.
        first: token at which the grid begins.
        box: (frames, height, width) of a tile.
        device: where the tables live.
    """
    starts = tile_origins(grid, box, device)
    return Side(box, starts, box_tokens(grid, first, box, starts))


def tile_origins(grid: Grid, box: Tile, device: torch.device) -> Tensor:
    """Return the origins of the tiles of a grid, int64 [tiles, 3], in row-major order."""
    axes = (torch.arange(0, length, side, device=device) for length, side in zip(grid, box, strict=True))
    return torch.cartesian_prod(*axes).view(-1, 3)


def inward_tiles(grid: Grid, first: int, box: Tile, device: torch.device) -> tuple[Side, Tensor]:
    """Lay boxes over the grid as tiles; those that would hang over its end are shifted inward.

    Args:
        grid: (frames, height, width), in tokens; no side of the box is longer.
        first: token at which the grid begins.
        box: (frames, height, width) of a tile.
        device: where the tables live.

    Returns:
        The blocks, and the tokens that they own, int32 [n, block]: those that no earlier tile holds, else -1.
    """
    aligned = tile_origins(grid, box, device)
    starts = torch.minimum(aligned, torch.tensor(grid, device=device) - torch.tensor(box, device=device))
    tokens = box_tokens(grid, first, box, starts)
    places = tile_origins(box, (1, 1, 1), device)
    owned = (starts[:, None] + places >= aligned[:, None]).all(-1)
    return Side(box, starts, tokens), torch.where(owned, tokens, -1)


def runs_of(first: int, end: int, block: int, device: torch.device) -> Side:
    """Cut consecutive tokens into runs.

    Args:
        first: the first token.
        end: end of the tokens, not included.
        block: slots per block.
        device: where the tables live.
    """
    token = torch.arange(first, end, block, device=device)
    slots = token[:, None] + torch.arange(block, device=device)
    starts = torch.stack([torch.full_like(token, -1), torch.zeros_like(token), token], dim=1)
    return Side(None, starts, torch.where(slots < end, slots, -1).to(torch.int32))


def _fetchable(box: Tile, queries: bool) -> bool:
    sides = list(box)
    if max(sides) > _LONGEST:
        return False
    slowest = next((axis for axis, side in enumerate(sides) if side > 1), None)
    if queries and slowest is not None and sides[slowest] % 3 == 0:
        sides[slowest] //= 3
    return all(side & (side - 1) == 0 for side in sides)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, min(number, _LONGEST) + 1) if number % part == 0]
