"""Tiles: the grid cut into blocks of queries and of keys that are seen exactly or by proxy, never in part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log2, prod

import torch
from torch import Tensor

from visparse.boxes import Side, box_shapes, runs_of, tiles_of
from visparse.layout import Grid, Layout
from visparse.order import Tile
from visparse.patterns import Pattern, Selector, Skip
from visparse_kernels.boxes import Boxes

_BLOCKS = {64: (192, 128)}  # head size -> block sizes; what the Hopper kernel likes is taken on every device
_DEFAULT = (128, 128)
_LENGTHY = 0.03  # a tile twice as long as wide costs as much as 3 % more padding


def tile_blocks(head_dim: int) -> tuple[int, int]:
    """Return the tokens of a tile of queries and of a tile of keys, the same on every device.

    Args:
        head_dim: size of a head.
    """
    return _BLOCKS.get(head_dim, _DEFAULT)


def kept_tiles(share: float, tiles: int) -> int:
    """Return how many tiles a share of them is, at least one.

    Args:
        share: in (0, 1].
        tiles: number of tiles of keys.
    """
    return min(tiles, max(1, round(share * tiles)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles:
    """The tiles of a layout. Extra tokens are cut into runs, which come after the tiles of the grid.

    Attributes:
        layout: grid and extra tokens.
        block_q, block_k: slots of a tile.
        q_box, k_box: shapes (frames, height, width) of the tiles.
        visual_q, visual_k: number of tiles of the grid.
        q_order, k_order: int32 [tiles * block], slot -> token; -1 is padding.
        boxes: where the tiles lie, for `BlockLists`.
    """

    layout: Layout
    block_q: int
    block_k: int
    q_box: Tile
    k_box: Tile
    visual_q: int
    visual_k: int
    q_order: Tensor
    k_order: Tensor
    boxes: Boxes

    @property
    def n_q(self) -> int:
        """Blocks of queries, those of extra tokens too."""
        return len(self.q_order) // self.block_q

    @property
    def n_k(self) -> int:
        """Blocks of keys, those of extra tokens too."""
        return len(self.k_order) // self.block_k

    @property
    def keys(self) -> Tensor:
        """Tokens of the key tiles of the grid, int32 [visual_k, block_k]; -1 is padding."""
        return self.k_order.view(-1, self.block_k)[: self.visual_k]

    def widen(self, pattern: Pattern) -> Tensor:
        """Return the tiles of which a pattern keeps something, bool [visual_q, visual_k].

        Args:
            pattern: what is kept.

        Raises:
            ValueError: it does not fit the grid.
        """
        q, k = (
            order.view(-1, block)[:count].long()
            for order, block, count in (
                (self.q_order, self.block_q, self.visual_q),
                (self.k_order, self.block_k, self.visual_k),
            )
        )
        first = self.layout.before
        some, _ = pattern.cover(torch.where(q < 0, -1, q - first), torch.where(k < 0, -1, k - first), self.layout.grid)
        return some

    def block_density(self, pattern: Pattern) -> tuple[float, float]:
        """Return visited blocks over all blocks of a head whose pattern is widened to tiles: least and most.

        Args:
            pattern: of the head; the two differ only for a selector that decides by what it sees.

        Raises:
            ValueError: it does not fit the grid.
        """
        if isinstance(pattern, Skip):
            return 0.0, 0.0
        if isinstance(pattern, Selector):
            least, most = (self.visual_q * kept_tiles(share, self.visual_k) for share in pattern.shares)
        else:
            least = most = int(self.widen(pattern).sum())
        blocks = self.n_q * self.n_k
        extra = blocks - self.visual_q * self.visual_k
        return (least + extra) / blocks, (most + extra) / blocks

    def with_extra(self, kept: Tensor) -> Tensor:
        """Add the blocks of extra tokens, which see everything and are seen by everything.

        Args:
            kept: bool [..., visual_q, visual_k].

        Returns:
            bool [..., n_q, n_k].
        """
        more = (0, self.n_k - self.visual_k, 0, self.n_q - self.visual_q)
        return torch.nn.functional.pad(kept, more, value=True)


@lru_cache(maxsize=16)
def tiles_for(layout: Layout, block_q: int, block_k: int, device: torch.device) -> Tiles:
    """Cut a layout into tiles; the last 16 results are cached.

    The shapes are those with little padding at the ends of the axes and with sides of similar length.

    Args:
        layout: grid and extra tokens.
        block_q: tokens of a tile of queries.
        block_k: tokens of a tile of keys.
        device: where the tables live.

    Raises:
        ValueError: no shape has that many tokens.
    """
    grid, first = layout.grid, layout.before
    q_box, k_box = _shape(grid, block_q, "block_q"), _shape(grid, block_k, "block_k")
    q, k = tiles_of(grid, first, q_box, device), tiles_of(grid, first, k_box, device)
    end = first + layout.visual
    extra = [(0, first), (end, layout.tokens)]
    all_q = [q, *(runs_of(a, b, block_q, device) for a, b in extra)]
    all_k = [k, *(runs_of(a, b, block_k, device) for a, b in extra)]
    return Tiles(
        layout=layout,
        block_q=block_q,
        block_k=block_k,
        q_box=q_box,
        k_box=k_box,
        visual_q=len(q.starts),
        visual_k=len(k.starts),
        q_order=_tokens(all_q),
        k_order=_tokens(all_k),
        boxes=Boxes(
            grid=grid, first=first, q_box=(q_box,), k_box=(k_box,), q_starts=_starts(all_q), k_starts=_starts(all_k)
        ),
    )


def _shape(grid: Grid, block: int, name: str) -> Tile:
    shapes = box_shapes(grid, block, queries=name == "block_q") or _hanging(grid, block)
    if not shapes:
        raise ValueError(f"{name}: wanted a number of tokens that is a power of two, or three times one, got {block}")

    def cost(box: Tile) -> tuple[float, Tile]:
        padded = prod(-(-length // side) * side for length, side in zip(grid, box, strict=True))
        sides = [log2(side) for side, length in zip(box, grid, strict=True) if length > 1]
        return padded / prod(grid) * (1 + _LENGTHY * (max(sides, default=0) - min(sides, default=0))), box

    return min(shapes, key=cost)


def _hanging(grid: Grid, block: int) -> list[Tile]:
    """Shapes for a grid that is smaller than a tile: they hang over its end."""
    sides = [1 << i for i in range(9)]
    return [box for box in product(sides, sides, sides) if prod(box) == block]


def _tokens(sides: list[Side]) -> Tensor:
    return torch.cat([side.tokens for side in sides]).flatten().to(torch.int32)


def _starts(sides: list[Side]) -> Tensor:
    return torch.cat([side.starts for side in sides]).to(torch.int32)[None]
