"""Pooled: scores of tiles from mean queries and mean keys, of whole tiles or of boxes that they are cut into."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.proxy_table import part_of
from visparse.compensation.tiles import Tiles
from visparse.order import Tile
from visparse.patterns import Selector
from visparse_kernels import block_scores

_MOST_OF_QUERIES = 4  # errors hardly fall with more parts of queries; with parts of keys they do


def pooled_tiles(call: Call, tiles: Tiles, selector: Selector) -> Tensor:
    """Score all tiles, those of extra tokens too.

    Args:
        call: of attention.
        tiles: of the layout.
        selector: says kind and parts; its score is a pooled one.

    Returns:
        fp32 [B, H, n_q, n_k]; fp64 for fp64 inputs.
    """
    q_parts = min(selector.parts, _MOST_OF_QUERIES)
    q_order, k_order = parted(tiles, q_parts, selector.parts)
    return block_scores(
        call.q,
        call.k,
        None,
        q_order=q_order,
        k_order=k_order,
        block_q=tiles.block_q,
        block_k=tiles.block_k,
        kind=selector.score,
        q_parts=q_parts,
        k_parts=selector.parts,
        key_bias=call.bias,
        scale=call.scale,
    )


@lru_cache(maxsize=16)
def parted(tiles: Tiles, q_parts: int, k_parts: int) -> tuple[Tensor, Tensor]:
    """Return the orders of queries and keys with the slots of each part side by side; the last 16 results are cached.

    Blocks of extra tokens stay runs, so their parts are shorter runs.

    Args:
        tiles: of the layout.
        q_parts, k_parts: powers of two up to 16.
    """
    queries = _by_part(tiles.q_order, tiles.block_q, tiles.visual_q, tiles.q_box, q_parts)
    return queries, _by_part(tiles.k_order, tiles.block_k, tiles.visual_k, tiles.k_box, k_parts)


def _by_part(order: Tensor, block: int, visual: int, box: Tile, parts: int) -> Tensor:
    if parts == 1:
        return order
    slots = part_of(box, parts).argsort(stable=True).to(order.device)
    table = order.view(-1, block).clone()
    table[:visual] = table[:visual, slots]
    return table.flatten()
