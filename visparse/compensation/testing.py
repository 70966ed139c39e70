"""What the tests of compensations share: one layer called as a denoiser would call it, and definitions in fp64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visparse.compensation.serve import Compensation
from visparse.compensation.tiles import Tiles, tiles_of_plan
from visparse.layout import Layout
from visparse.patterns import Neighborhood
from visparse.plan import SparsePlan
from visparse.route import LayerStats
from visparse.router import Router
from visparse.rules import ModelFingerprint
from visparse.settings import Settings
from visparse.steps import Clock

LAYOUT = Layout((3, 10, 12), before=5, after=3)
HEADS, HEAD_DIM, BLOCKS = 3, 16, (64, 32)
NEAR = Neighborhood(window=(3, 5, 5))
States = tuple[Tensor, Tensor, Tensor]


class Context(NamedTuple):
    """What a pipeline says of a call."""

    step_index: int
    num_inference_steps: int
    name: str = "cond"


class Run:
    """Two layers under a plan: three heads of 16, tiles of 64 queries and 32 keys, two dense steps."""

    def __init__(self, total: int = 6, **plan: Any) -> None:
        """Make a plan of a window, changed by `plan`, for runs of `total` steps."""
        usual: dict[str, Any] = {"name": "test", "patterns": {"near": NEAR}, "default": "near", "dense_steps": 2}
        self.plan, self.total = SparsePlan(**usual | plan), total
        model = ModelFingerprint(model_class="Any", layers=2, heads=HEADS, head_dim=HEAD_DIM)
        settings = Settings(block_q=BLOCKS[0], block_k=BLOCKS[1], strict=True)
        self.router = Router(self.plan, model, settings, Clock(self.plan.stage))

    def call(
        self,
        step: int,
        seed: int = 0,
        *,
        branch: str = "cond",
        layout: Layout = LAYOUT,
        batch: int = 1,
        mask: Tensor | None = None,
        states: States | None = None,
        layers: tuple[int, ...] = (0,),
    ) -> tuple[Tensor, States]:
        """One call of the denoiser.

        Args:
            step: of the run.
            seed: of the inputs.
            branch: name of the cache context.
            layout: of the tokens.
            batch: rows.
            mask: bool [1, 1, 1, tokens], keys that are seen; None: all.
            states: query, key and value; None: drawn.
            layers: those that run, with the same inputs.

        Returns:
            The output of the last layer, and what went in.
        """
        states = inputs(seed, layout, batch) if states is None else states
        self.router.clock.enter(Context(step, self.total, branch))
        self.router.begin(layout, None, torch.device("cpu"))
        call: dict[str, Any] = dict(zip(("query", "key", "value"), states, strict=True))
        for layer in layers:
            route = self.router.routes[layer]
            out = route.attention(call | {"attn_mask": mask}, lambda: dense(*states, mask)[0], False)
        self.router.end(True)
        self.router.clock.enter(None)
        return out, states

    @property
    def serving(self) -> Compensation:
        """What serves the layers."""
        if self.router.compensation is None:
            raise ValueError("plan: wanted one with a compensation or a selector, got neither; give it one")
        return self.router.compensation

    @property
    def stats(self) -> LayerStats:
        """Counts of the first layer."""
        return self.router.routes[0].stats

    @property
    def tiles(self) -> Tiles:
        """Tiles of the plan, on the usual layout."""
        return tiles_of_plan(self.plan, LAYOUT, HEAD_DIM, torch.device("cpu"), block_q=BLOCKS[0], block_k=BLOCKS[1])


def inputs(seed: int, layout: Layout = LAYOUT, batch: int = 1) -> States:
    """Draw query, key and value, [batch, tokens, heads, head_dim].

    Args:
        seed: of the draw.
        layout: of the tokens.
        batch: rows.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.tokens, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention in fp64: output in fp32, and log-sum-exp.

    Args:
        q, k, v: [B, N, H, D].
        mask: bool, broadcasts to [B, H, N, N], pairs that are kept; None: all.
    """
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", (scores - lse[..., None]).exp(), v.double()).float(), lse


def is_dense(out: Tensor, states: States) -> bool:
    """Whether an output is that of dense attention.

    Args:
        out: [B, N, H, D].
        states: query, key and value.
    """
    return bool((out - dense(*states)[0]).norm() < 1e-5 * out.norm())


def token_blocks(order: Tensor, block: int) -> Tensor:
    """The block that each token lies in, int64 [tokens].

    Args:
        order: int32 [slots], slot -> token, -1 is padding.
        block: slots per block.
    """
    blocks = torch.zeros(int(order.max()) + 1, dtype=torch.int64)
    for slot, token in enumerate(order.tolist()):
        if token >= 0:
            blocks[token] = slot // block
    return blocks


def tile_mass(states: States, tiles: Tiles, every: int = 1, mask: Tensor | None = None) -> Tensor:
    """Mass of each pair of tiles of the grid, of the first batch row, fp64 [H, visual_q, visual_k].

    Args:
        states: query, key and value.
        tiles: of the layout.
        every: only the first query of a tile and every so many after it count.
        mask: bool [1, 1, 1, tokens], keys that are seen; None: all.
    """
    q, k, _ = (x.double() for x in states)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)[0]
    block_of_k = token_blocks(tiles.k_order, tiles.block_k)
    mass = torch.zeros(weights.shape[0], tiles.n_q, tiles.n_k, dtype=torch.float64)
    for block, row in enumerate(tiles.q_order.view(-1, tiles.block_q).tolist()):
        for token in [token for token in row if token >= 0][::every]:
            mass[:, block].index_add_(-1, block_of_k, weights[:, token])
    return mass[:, : tiles.visual_q, : tiles.visual_k]
