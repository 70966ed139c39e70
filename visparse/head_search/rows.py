"""Rows: the queries of a layout at which candidates are judged, and what each candidate keeps for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visparse.compensation.tiles import Tiles
from visparse.layout import coordinates
from visparse.patterns import Pattern
from visparse_kernels.block_scores.slots import sampled_rows

CHOOSES = 4  # a selector looks at every fourth query of a tile


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A sample of the queries of a layout: some tiles, and every few queries of each.

    Attributes:
        tiles: of the layout.
        blocks: int64 [T], the sampled tiles of queries, ascending; those of extra tokens come last.
        tokens: int64 [T, r], tokens of their queries, -1 padding.
        chooses: bool [T, r], the queries that a selector looks at.
    """

    tiles: Tiles
    blocks: Tensor
    tokens: Tensor
    chooses: Tensor

    @property
    def real(self) -> Tensor:
        """Which places hold a query, bool [T, r]."""
        return self.tokens >= 0

    def part(self, start: int, stop: int) -> Rows:
        """The rows of some of the tiles."""
        cut = slice(start, stop)
        return Rows(tiles=self.tiles, blocks=self.blocks[cut], tokens=self.tokens[cut], chooses=self.chooses[cut])


def sample_rows(tiles: Tiles, count: int | None, every: int, seed: int) -> Rows:
    """Pick tiles of queries spread over the grid, and one tile of extra tokens where there are any.

    The tiles of the grid are cut into as many stretches as are wanted, and one is drawn from each.

    Args:
        tiles: of the layout.
        count: tiles of the grid; None: all of them.
        every: every so many queries of a tile; 1, 2 or 4.
        seed: of the draw.
    """
    device = tiles.q_order.device
    if count is None or count >= tiles.visual_q:
        picked = list(range(tiles.n_q))
    else:
        edges = [round(i * tiles.visual_q / count) for i in range(count + 1)]
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        picked = [a + int(x * (b - a)) for x, a, b in zip(draws, edges[:-1], edges[1:], strict=True)]
        picked += [tiles.visual_q] if tiles.n_q > tiles.visual_q else []
    blocks = torch.tensor(picked, dtype=torch.int64, device=device)
    tokens = sampled_rows(tiles.q_order, tiles.block_q, every)[blocks].long()
    rank = torch.arange(tokens.shape[1], device=device) * every
    return Rows(tiles=tiles, blocks=blocks, tokens=tokens, chooses=(tokens >= 0) & (rank % CHOOSES == 0))


def kept_keys(rows: Rows, pattern: Pattern) -> Tensor:
    """The keys that a pattern keeps for each query, to the letter.

    Args:
        rows: the queries.
        pattern: no selector and not `Skip`.

    Returns:
        bool [T * r, n_k * block_k]: slots of the keys, in the order of the tiles; extra tokens are kept, and keep all.
    """
    tiles, layout = rows.tiles, rows.tiles.layout
    keys = tiles.k_order.long() - layout.before
    of_grid = (keys >= 0) & (keys < layout.visual)
    k = coordinates(keys.clamp(0, layout.visual - 1), layout.grid)
    parts = []
    for tokens in rows.tokens:  # a tile at a time: coordinates of all pairs would be large
        places = tokens - layout.before
        extra = (tokens >= 0) & ((places < 0) | (places >= layout.visual))
        q = coordinates(places.clamp(0, layout.visual - 1), layout.grid)
        kept = pattern.pairs(q[:, None], k[None], layout.grid)
        parts.append(kept | ~of_grid | extra[:, None])
    return torch.cat(parts)


def kept_tiles(rows: Rows, pattern: Pattern) -> Tensor:
    """The tiles of keys that a pattern keeps something of, for each tile of queries.

    Args:
        rows: the queries.
        pattern: no selector and not `Skip`.

    Returns:
        bool [T, n_k].
    """
    return rows.tiles.with_extra(rows.tiles.widen(pattern))[rows.blocks]
