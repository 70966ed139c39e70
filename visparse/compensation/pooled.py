"""Pooled: scores of tiles from mean queries and mean keys; tiles of keys may be cut into boxes with a mean each."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.laid_out import Laid
from visparse.compensation.tiles import Tiles
from visparse.patterns import Selector
from visparse_kernels import block_scores
from visparse_kernels.block_scores.pooled import scores_of_means


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


def scores_of_laid(laid: Laid, tiles: Tiles, parts: int) -> Tensor:
    """Score all tiles from means that were made when tensors were laid out; the same as `pooled_tiles` gives.

    Args:
        laid: without a bias, with means.
        tiles: in whose order it is laid.
        parts: of a tile of keys, at most as many as have means.

    Returns:
        fp32 [B, H, n_q, n_k].
    """
    queries, keys = laid.rows.q_mean, laid.rows.k_mean
    if queries is None or keys is None:
        raise ValueError("laid: wanted means of tiles, got none; ask `LaidOut.lay` for parts")
    if parts < laid.parts:
        fine = sizes_of(tiles, laid.parts)[:, None]
        keys = (keys * fine).unflatten(2, (-1, laid.parts // parts)).sum(3)
        keys = keys / sizes_of(tiles, parts).clamp(min=1)[:, None]
    scale = queries.shape[-1] ** -0.5 if laid.call.scale is None else laid.call.scale
    return scores_of_means(queries, keys, _log_sizes(tiles, parts), scale, parts)


@lru_cache(maxsize=16)
def sizes_of(tiles: Tiles, parts: int) -> Tensor:
    """Tokens of each part of a tile of keys, fp32 [n_k * parts]; the last 16 results are cached.

    Args:
        tiles: of a layout, runs of a curve.
        parts: of a tile of keys.
    """
    return (tiles.k_order.view(tiles.n_k * parts, -1) >= 0).sum(1).float()


@lru_cache(maxsize=16)
def _log_sizes(tiles: Tiles, parts: int) -> Tensor:
    return sizes_of(tiles, parts).log()[None, None]


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
