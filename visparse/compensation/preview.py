"""What the sparse steps of a layer will visit, said before any run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from visparse.compensation.tiles import tiles_of_plan
from visparse.layout import Layout
from visparse.patterns import Selector

if TYPE_CHECKING:
    from visparse.router import Router


def tiled_density(router: Router, layer: int, layout: Layout, stage: int, device: torch.device) -> float | None:
    """Return the block density of a layer whose heads see whole tiles.

    Args:
        router: of a plan with compensations or selectors.
        layer: index of the layer.
        layout: of the tokens.
        stage: of the plan.
        device: where patterns are compared with tiles.

    Returns:
        Visited blocks over all blocks, mean over heads; the middle of its range for `TopP`. None for a dense layer, and
        where the plan's patterns keep their own masks.

    Raises:
        ValueError: a pattern does not fit the grid.
    """
    names = router.plan.names(layer, router.model.heads, stage)
    if names is None:
        return None
    patterns = [router.plan.patterns[name].resolve(layout.grid) for name in names]
    if router.plan.proxies is None and not any(isinstance(pattern, Selector) for pattern in patterns):
        return None
    blocks = {"block_q": router.settings.block_q, "block_k": router.settings.block_k}
    tiles = tiles_of_plan(router.plan, layout, router.model.head_dim, device, **blocks)
    shares = {pattern: sum(tiles.block_density(pattern)) / 2 for pattern in dict.fromkeys(patterns)}
    return sum(shares[pattern] for pattern in patterns) / len(patterns)
