"""Tiles: the grid cut into blocks of queries and of keys that are seen exactly or by proxy, never in part.

Boxes suit patterns by position, whose windows they share edges with. Their sides are powers of two, so on many grids
they hang over the ends (25 % more blocks at 21 x 45 x 80 and 21 x 30 x 52) or are long and thin. Runs of a serpentine
curve are compact on every grid and have no padding, which suits tiles that are chosen by content: the nearer the tokens
of a tile are, the better one score and one proxy speak for all of them. What is left at the end of the curve shares a
block with the extra tokens, where there are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log2, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse.boxes import Side, box_shapes, runs_of, tiles_of
from visparse.layout import Grid, Layout
from visparse.order import Tile, pad_tokens
from visparse.order_serpentine import halve_tiles, serpentine_order
from visparse.patterns import Pattern, Selector, Skip
from visparse_kernels.boxes import Boxes

if TYPE_CHECKING:
    from visparse.plan import SparsePlan

_BLOCKS = {64: (192, 128)}  # head size -> block sizes; what the Hopper kernel likes is taken on every device
_DEFAULT = (128, 128)
_HALVED = 4  # times, so tiles of keys have up to 16 compact parts
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
    """The tiles of a layout. Blocks of extra tokens come after them: what lies in these sees all and is seen by all.

    Attributes:
        layout: grid and extra tokens.
        block_q, block_k: slots of a tile.
        q_box, k_box: shapes (frames, height, width) of the tiles; None where they are runs of a serpentine curve.
        visual_q, visual_k: number of tiles of the grid.
        q_order, k_order: int32 [tiles * block], slot -> token; -1 is padding.
        boxes: where the tiles lie, for `BlockLists`; None where they are no boxes.
    """

    layout: Layout
    block_q: int
    block_k: int
    q_box: Tile | None
    k_box: Tile | None
    visual_q: int
    visual_k: int
    q_order: Tensor
    k_order: Tensor
    boxes: Boxes | None

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

    def parts(self, count: int) -> Tensor:
        """Cut a tile of keys into parts.

        A box is halved along its longest axis again and again; so are tiles of a curve, up to 16 parts.

        Args:
            count: of the parts, a power of two up to ``block_k``.

        Returns:
            int64 [block_k], the part of each slot.
        """
        if self.k_box is None:
            return torch.arange(self.block_k, device=self.k_order.device) * count // self.block_k
        return _halved(self.k_box, count).to(self.k_order.device)

    def parents(self) -> Tensor:
        """Number the neighbourhoods of eight key tiles: 2 x 2 x 2 boxes, or eight in a row on a curve.

        Returns:
            int64 [visual_k].
        """
        if self.k_box is None:
            return torch.arange(self.visual_k, device=self.k_order.device) // 8
        counts = [-(-length // side) for length, side in zip(self.layout.grid, self.k_box, strict=True)]
        at = torch.cartesian_prod(*(torch.arange(count) for count in counts)).view(-1, 3) // 2
        wide = torch.tensor([-(-count // 2) for count in counts])
        return ((at[:, 0] * wide[1] + at[:, 1]) * wide[2] + at[:, 2]).to(self.k_order.device)

    def block_of(self) -> Tensor:
        """Say in which block of queries each token lies, int64 [N]."""
        block = torch.arange(self.n_q, device=self.q_order.device).repeat_interleave(self.block_q)
        spare = torch.where(self.q_order < 0, self.layout.tokens, self.q_order).long()
        return torch.zeros(self.layout.tokens + 1, dtype=torch.int64, device=block.device).scatter_(0, spare, block)[
            :-1
        ]

    def widen(self, pattern: Pattern) -> Tensor:
        """Return the tiles of which a pattern keeps something, bool [visual_q, visual_k].

        Never too few. Of runs that a pattern cuts on several axes, a few more: `Pattern.cover` looks at one axis at a
        time, and runs are not products of axes.

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
def tiles_for(layout: Layout, block_q: int, block_k: int, device: torch.device, *, serpentine: bool = False) -> Tiles:
    """Cut a layout into tiles; the last 16 results are cached.

    The shapes of boxes are those with little padding at the ends of the axes and with sides of similar length.

    Args:
        layout: grid and extra tokens.
        block_q: tokens of a tile of queries.
        block_k: tokens of a tile of keys.
        device: where the tables live.
        serpentine: whether tiles are runs of a serpentine curve instead of boxes.

    Raises:
        ValueError: a size is neither a power of two nor three times one, or no box has that many tokens.
    """
    grid, first = layout.grid, layout.before
    end = first + layout.visual
    extra = [(0, first), (end, layout.tokens)]
    extra_q, extra_k = ([runs_of(a, b, block, device) for a, b in extra] for block in (block_q, block_k))
    q_box = k_box = boxes = None
    more_q, more_k = ([side.tokens for side in sides] for sides in (extra_q, extra_k))
    if serpentine:
        q, k = _along_curve(layout, block_q, block_k, device)
        (q, more_q), (k, more_k) = _with_last(layout, q, more_q), _with_last(layout, k, more_k)
    else:
        q_side = tiles_of(grid, first, _shape(grid, block_q, "block_q"), device)
        k_side = tiles_of(grid, first, _shape(grid, block_k, "block_k"), device)
        q, k, q_box, k_box = q_side.tokens, k_side.tokens, q_side.box, k_side.box
        starts = {"q_starts": _starts([q_side, *extra_q]), "k_starts": _starts([k_side, *extra_k])}
        boxes = Boxes(grid=grid, first=first, q_box=(q_box,), k_box=(k_box,), **starts)
    return Tiles(
        layout=layout,
        block_q=block_q,
        block_k=block_k,
        q_box=q_box,
        k_box=k_box,
        visual_q=len(q),
        visual_k=len(k),
        q_order=_order([q, *more_q]),
        k_order=_order([k, *more_k]),
        boxes=boxes,
    )


def tiles_of_plan(
    plan: SparsePlan,
    layout: Layout,
    head_dim: int,
    device: torch.device,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Tiles:
    """Return the tiles of a plan; see `Proxies.tiles`. Without proxies they are as with ``"auto"``.

    Args:
        plan: the plan.
        layout: grid and extra tokens.
        head_dim: size of a head.
        device: where the tables live.
        block_q, block_k: tokens of a tile; None: those of `Proxies.blocks`, else of `tile_blocks`.

    Raises:
        ValueError: as `tiles_for`.
    """
    wanted = "auto" if plan.proxies is None else plan.proxies.tiles
    serpentine = bool(plan.selectors) if wanted == "auto" else wanted == "serpentine"
    usual = (None if plan.proxies is None else plan.proxies.blocks) or tile_blocks(head_dim)
    return tiles_for(layout, block_q or usual[0], block_k or usual[1], device, serpentine=serpentine)


def _along_curve(layout: Layout, block_q: int, block_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the tiles of queries and of keys along the curve, int64 [tiles, block]; -1 is padding."""
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block // (block & -block) not in (1, 3):  # what kernels can be compiled for
            raise _wrong_size(name, block)
    curve = serpentine_order(layout.grid, block_k, device)
    q, k = (pad_tokens(curve, block).view(-1, block) for block in (block_q, block_k))
    k = halve_tiles(k, layout.grid, min(_HALVED, (block_k & -block_k).bit_length() - 1))
    q, k = (torch.where(tiles < 0, -1, tiles + layout.before) for tiles in (q, k))
    return q, k


def _halved(box: Tile, parts: int) -> Tensor:
    """The part of each token of a box, in row-major order, int64."""
    cells, left = [1, 1, 1], parts
    while left > 1:
        axis = max(range(3), key=lambda a: (box[a] // cells[a] if box[a] // cells[a] > 1 else 0, a))
        cells[axis] *= 2
        left //= 2
    places = torch.cartesian_prod(*(torch.arange(side) for side in box)).view(-1, 3)
    sides = torch.tensor([max(side // cell, 1) for side, cell in zip(box, cells, strict=True)])
    at = torch.minimum(places // sides, torch.tensor(cells) - 1)
    return (at[:, 0] * cells[1] + at[:, 1]) * cells[2] + at[:, 2]


def _shape(grid: Grid, block: int, name: str) -> Tile:
    shapes = box_shapes(grid, block, queries=name == "block_q") or _hanging(grid, block)
    if not shapes:
        raise _wrong_size(name, block)

    def cost(box: Tile) -> tuple[float, Tile]:
        padded = prod(-(-length // side) * side for length, side in zip(grid, box, strict=True))
        sides = [log2(side) for side, length in zip(box, grid, strict=True) if length > 1]
        return padded / prod(grid) * (1 + _LENGTHY * (max(sides, default=0) - min(sides, default=0))), box

    return min(shapes, key=cost)


def _wrong_size(name: str, block: int) -> ValueError:
    return ValueError(f"{name}: wanted a number of tokens that is a power of two, or three times one, got {block}")


def _hanging(grid: Grid, block: int) -> list[Tile]:
    """Shapes for a grid that is smaller than a tile: they hang over its end."""
    sides = [1 << i for i in range(9)]
    return [box for box in product(sides, sides, sides) if prod(box) == block]


def _with_last(layout: Layout, tiles: Tensor, extra: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Put the tokens of the last tile of a curve, where it is not full, into the block of extra tokens, if all fit in.

    A block of extra tokens is visited by every block, however few it holds, as one class token.

    Args:
        layout: grid and extra tokens.
        tiles: tokens [n, block], -1 padding, which lies in the last one.
        extra: blocks of extra tokens, [m, block] each.

    Returns:
        The tiles, of which two at least are left to choose from, and the blocks of extra tokens.
    """
    last, extra_tokens = layout.visual % tiles.shape[1], layout.tokens - layout.visual
    if not last or not extra_tokens or len(tiles) < 3 or last + extra_tokens > tiles.shape[1]:
        return tiles, extra
    counts = (layout.before, layout.after)
    tokens = [tiles[-1, :last], *(block.flatten()[:count] for block, count in zip(extra, counts, strict=True))]
    return tiles[:-1], [pad_tokens(torch.cat(tokens), tiles.shape[1])[None]]


def _order(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks).flatten().to(torch.int32)


def _starts(sides: list[Side]) -> Tensor:
    return torch.cat([side.starts for side in sides]).to(torch.int32)[None]
