"""The effect on the whole model: its saliency map with all layers sparse, beside the map with dense attention."""

from __future__ import annotations

from typing import Any

import torch
from cells import Cell, Scores, compensated
from layer import Layer, Seen
from torch import Tensor
from vit import SaliencyViT

from visparse.compensation.tiles import Tiles

PLANS = (
    Cell(9, "window", "dropped"),
    Cell(9, "window", "proxies"),
    Cell(9, "pooled", "proxies"),
    Cell(9, "mass", "dropped"),
    Cell(9, "mass_variance", "proxies"),
)


def sparse_map(model: SaliencyViT, tiles: Tiles, picture: Tensor, plan: Cell) -> Tensor:
    """Return the saliency map with the same plan in every layer, fp32 [1, 1, side, side].

    Tiles are chosen in every layer from its own queries and keys, as they are with sparse layers before it.

    Args:
        model, tiles: of the study.
        picture: fp32 [1, 3, side, side].
        plan: what is kept and compensated.
    """

    def attention(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = Layer(tiles, q, k, v)
        return compensated(Seen.run(layer, Scores(layer).kept(plan.choice, plan.tiles)), plan.compensation)

    return model(picture, attention)


def floor_map(model: SaliencyViT, picture: Tensor) -> Tensor:
    """Return the saliency map with dense attention of PyTorch, which adds in another order, [1, 1, side, side]."""

    def attention(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return model(picture, attention)


def compare(got: Tensor, dense: Tensor) -> dict[str, Any]:
    """Return PSNR in dB, peak 1, and the correlation of two saliency maps."""
    both = torch.stack([got.flatten(), dense.flatten()]).double()
    error = (both[0] - both[1]).square().mean().clamp(min=1e-20)
    return {"psnr": float(-10 * error.log10()), "correlation": float(torch.corrcoef(both)[0, 1])}
