"""Which tiles are seen exactly: by position, by the scores that ship, or by what dropping really costs."""

from __future__ import annotations

import torch
from layer import TILE, Layer, pool
from torch import Tensor

from visparse.compensation import Proxies
from visparse.compensation.choice import select
from visparse.compensation.proxy_table import proxy_table
from visparse.patterns import Neighborhood, TopK
from visparse_kernels import block_scores

SAMPLE = TopK().sample  # every so many queries are looked at, as plans do
_SIDE = 8  # tokens along a tile


def window(layer: Layer, tiles: int) -> Tensor:
    """Keep a square of tiles around each tile of queries, shifted inward at the borders.

    It is the token pattern `Neighborhood`, whose window and stride are whole tiles.

    Args:
        layer: of the model.
        tiles: 9 or 25, the square of an odd number.

    Returns:
        bool [1, H, tiles, tiles].
    """
    across = round(tiles**0.5)
    if across * across != tiles or across % 2 == 0:
        raise ValueError(f"tiles: wanted the square of an odd number, got {tiles}; 9 is a window of 3 x 3 tiles")
    pattern = Neighborhood(window=(1, across * _SIDE, across * _SIDE), stride=(1, _SIDE, _SIDE))
    return layer.tiles.widen(pattern).expand(1, layer.heads, -1, -1)


def by_score(scores: Tensor, tiles: int, spread: bool = False) -> Tensor:
    """Keep the tiles with the highest scores.

    Args:
        scores: [1, H, n, n].
        tiles: how many in each row; with ``spread`` their mean over rows and heads.
        spread: see `TopK`.

    Returns:
        bool [1, H, n, n].
    """
    return select(TopK(share=tiles / scores.shape[-1], spread=spread), scores)


def shipped_scores(layer: Layer, kind: str, sample: int = SAMPLE) -> Tensor:
    """Return the scores of a selector, [1, H, tiles, tiles].

    Args:
        layer: of the model.
        kind: ``"pooled"``, ``"mass"`` or ``"mass_variance"``.
        sample: every so many queries are looked at, for the two exact ones.
    """
    tiles = layer.tiles
    scores = block_scores(
        layer.q,
        layer.k,
        None if kind == "pooled" else layer.dense[1],
        q_order=tiles.q_order,
        k_order=tiles.k_order,
        block_q=TILE,
        block_k=TILE,
        kind=kind,
        sample=1 if kind == "pooled" else sample,
    )
    return scores[..., : tiles.visual_q, : tiles.visual_k]


def residual_scores(layer: Layer) -> Tensor:
    """Return what it costs to replace one tile by its proxy: the squared change of the output, a mean over queries.

    Plain PyTorch, a tile at a time. It needs the dense output, so no plan can use it: it is the mark for the others.

    Args:
        layer: of the model, without padding in its tiles.

    Returns:
        [1, H, tiles, tiles].
    """
    tiles = layer.tiles
    queries, keys = tiles.q_order.view(-1, TILE)[: tiles.visual_q, ::SAMPLE].long(), tiles.keys.long()
    if bool((queries < 0).any()) or bool((keys < 0).any()):
        raise ValueError(f"layer: wanted a grid of whole tiles of 8 x 8 tokens, got {tiles.layout.grid}")
    rows = queries.flatten()
    dense, lse = layer.dense
    k, v = (x[0].transpose(0, 1) for x in (layer.k, layer.v))  # [H, N, D]
    q, out = (x[0, rows].transpose(0, 1) for x in (layer.q, dense))  # [H, rows, D]
    lse = lse[0][:, rows, None]
    proxies = Proxies()
    pooled_k, pooled_v, weight = pool(layer, proxies, proxy_table(tiles, proxies))
    scale = q.shape[-1] ** -0.5
    scores = torch.empty(1, layer.heads, tiles.visual_q, tiles.visual_k)
    for tile, members in enumerate(keys):
        shares = (scale * q @ k[:, members].transpose(1, 2) - lse).exp()
        mass, value = shares.sum(-1, keepdim=True), shares @ v[:, members]
        proxy = (scale * q @ pooled_k[0, tile, :, :, None] + weight[0, 0, tile] - lse).exp()
        change = proxy * pooled_v[0, tile, :, None] - value - (proxy - mass) * out
        effect = (change / (1 + proxy - mass)).square().sum(-1)
        scores[0, :, :, tile] = effect.unflatten(1, queries.shape).mean(-1)
    return scores
