"""Pooled: scores of tiles from mean queries and mean keys; tiles of keys may be cut into boxes with a mean each."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.tiles import Tiles
from visparse.patterns import Selector
from visparse_kernels import block_scores


def pooled_tiles(call: Call, tiles: Tiles, selector: Selector) -> Tensor:
    """Score all tiles, those of extra tokens too.

    Args:
        call: of attention.
        tiles: of the layout.
        selector: says how many parts a tile of keys has; its score is ``"pooled"``.

    Returns:
        fp32 [B, H, n_q, n_k]; fp64 for fp64 inputs.
    """
    return block_scores(
        call.q,
        call.k,
        None,
        q_order=tiles.q_order,
        k_order=parted(tiles, selector.parts),
        block_q=tiles.block_q,
        block_k=tiles.block_k,
        kind="pooled",
        parts=selector.parts,
        key_bias=call.bias,
        scale=call.scale,
    )


@lru_cache(maxsize=16)
def parted(tiles: Tiles, parts: int) -> Tensor:
    """Return the order of keys with the slots of each part side by side; the last 16 results are cached.

    Blocks of extra tokens stay runs, so their parts are shorter runs.

    Args:
        tiles: of the layout.
        parts: of a tile of keys, a power of two up to 16.

    Returns:
        int32 [n_k * block_k].
    """
    if parts == 1:
        return tiles.k_order
    slots = tiles.parts(parts).argsort(stable=True)
    table = tiles.k_order.view(-1, tiles.block_k).clone()
    table[: tiles.visual_k] = table[: tiles.visual_k, slots]
    return table.flatten()
