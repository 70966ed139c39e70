"""Plans with compensations and selectors, layer by layer, against a definition written token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from visparse.compensation.proxy_table import proxy_table
from visparse.compensation.tiles import Tiles, tiles_for
from visparse.layout import Layout
from visparse.patterns import Neighborhood, Skip, TopK
from visparse.plan import SparsePlan
from visparse.router import Router
from visparse.rules import ModelFingerprint
from visparse.settings import Settings
from visparse.steps import Clock

LAYOUT = Layout((3, 10, 12), before=5, after=3)
HEADS, HEAD_DIM, BLOCKS = 3, 16, (64, 32)
NEAR = Neighborhood(window=(3, 5, 5))


class Context:
    """What a pipeline says of a call."""

    def __init__(self, step: int, total: int, name: str = "cond") -> None:
        self.step_index, self.num_inference_steps, self.name = step, total, name


class Run:
    """One layer under a plan, called as a denoiser would call it."""

    def __init__(self, total: int = 6, **plan: Any) -> None:
        plan = {"name": "test", "patterns": {"near": NEAR}, "default": "near", "dense_steps": 2} | plan
        self.plan, self.total = SparsePlan(**plan), total
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
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One call of layer 0; the output, and what went in."""
        states = inputs(seed, layout, batch)
        self.router.clock.enter(Context(step, self.total, branch))
        self.router.begin(layout, None, torch.device("cpu"))
        call = dict(zip(("query", "key", "value"), states, strict=True)) | {"attn_mask": mask}
        out = self.router.routes[0].attention(call, lambda: dense(*states, mask)[0], False)
        self.router.end(True)
        self.router.clock.enter(None)
        return out, states

    @property
    def stats(self) -> Any:
        return self.router.routes[0].stats

    @property
    def tiles(self) -> Tiles:
        return tiles_for(LAYOUT, *BLOCKS, torch.device("cpu"))


def inputs(seed: int, layout: Layout = LAYOUT, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.tokens, HEADS, HEAD_DIM)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention in fp64: output in fp32, and log-sum-exp."""
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", (scores - lse[..., None]).exp(), v.double()).float(), lse


def definition(
    states: tuple[Tensor, Tensor, Tensor], seen: Tensor, tiles: Tiles, parts: list[list[int]] | None
) -> tuple[Tensor, Tensor]:
    """Exact tokens of the tiles that are seen, and a mean for each part of the others, in one softmax, in fp64.

    Args:
        states: query, key and value.
        seen: bool [H, visual_q, visual_k], tiles of the grid that are seen exactly.
        tiles: of the layout.
        parts: tokens of each proxy; None: no proxies.
    """
    q, k, v = (x.double() for x in states)
    block_of_q = token_blocks(tiles.q_order, tiles.block_q)
    block_of_k = token_blocks(tiles.k_order, tiles.block_k)
    full = tiles.with_extra(seen)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                row = full[h, block_of_q[i]]
                keys, values = [k[b, row[block_of_k], h]], [v[b, row[block_of_k], h]]
                added = [torch.zeros(len(keys[0]), dtype=torch.float64)]
                for members in parts or []:
                    if not row[block_of_k[members[0]]]:
                        keys.append(k[b, members, h].mean(0, keepdim=True))
                        values.append(v[b, members, h].mean(0, keepdim=True))
                        added.append(torch.tensor([math.log(len(members))], dtype=torch.float64))
                score = torch.cat(keys) @ q[b, i, h] / math.sqrt(q.shape[-1]) + torch.cat(added)
                lse[b, h, i] = score.logsumexp(0)
                out[b, i, h] = (score - lse[b, h, i]).exp() @ torch.cat(values)
    return out, lse


def token_blocks(order: Tensor, block: int) -> Tensor:
    blocks = torch.zeros(int(order.max()) + 1, dtype=torch.int64)
    for slot, token in enumerate(order.tolist()):
        if token >= 0:
            blocks[token] = slot // block
    return blocks


def parts_of(run: Run) -> list[list[int]]:
    table = proxy_table(run.tiles, run.plan.proxies)
    return [[token for token in row if token >= 0] for row in table.members.tolist()]


def near_tiles(run: Run) -> Tensor:
    return run.tiles.widen(NEAR)[None].expand(HEADS, -1, -1)


@pytest.mark.parametrize("per_tile", [1, 4])
def test_proxies_stand_for_the_tiles_that_are_not_seen(per_tile: int) -> None:
    run = Run(proxies={"per_tile": per_tile}, dense_steps=0)
    out, states = run.call(0)
    seen = near_tiles(run)
    assert 0.1 < seen.float().mean() < 0.9
    wanted, _ = definition(states, seen, run.tiles, parts_of(run))
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)
    without, _ = definition(states, seen, run.tiles, None)
    assert (wanted - without).norm() > 0.05 * wanted.norm()


def test_every_token_has_one_proxy() -> None:
    for per_tile in (1, 2, 8):
        tokens = sorted(token for part in parts_of(Run(proxies={"per_tile": per_tile})) for token in part)
        assert tokens == list(range(LAYOUT.before, LAYOUT.before + LAYOUT.visual))


def test_proxies_of_equal_keys_and_values_are_exact() -> None:
    run = Run(proxies={}, dense_steps=0)
    generator = torch.Generator().manual_seed(1)
    q, k, v = inputs(0)
    for members in parts_of(run):
        k[:, members] = torch.randn(1, 1, HEADS, HEAD_DIM, generator=generator)
    wanted, _ = dense(q, k, v)
    run.router.clock.enter(Context(0, 6))
    run.router.begin(LAYOUT, None, torch.device("cpu"))
    out = run.router.routes[0].attention({"query": q, "key": k, "value": v}, lambda: q, False)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_all_tiles_seen_is_dense_attention() -> None:
    run = Run(patterns={"all": TopK(share=1.0, score="pooled")}, default="all", proxies={}, dense_steps=0)
    out, states = run.call(0)
    torch.testing.assert_close(out, dense(*states)[0], atol=2e-6, rtol=1e-5)


def test_a_choice_by_mass_is_made_at_the_last_dense_step_and_reused() -> None:
    run = Run(patterns={"mass": TopK(share=0.25, sample=1)}, default="mass", proxies={})
    first, states = run.call(0)
    assert torch.equal(first, dense(*states)[0])  # the model's own attention
    measured, states = run.call(1, seed=1)
    torch.testing.assert_close(measured, dense(*states)[0], atol=2e-6, rtol=1e-5)
    out, later = run.call(2, seed=2)
    mass = tile_mass(states, run.tiles)
    count = max(1, round(0.25 * run.tiles.visual_k))
    seen = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(count).indices, True)
    wanted, _ = definition(later, seen, run.tiles, parts_of(run))
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)
    assert (run.stats.dense, run.stats.measured, run.stats.compensated) == (1, 1, 1)


def tile_mass(states: tuple[Tensor, Tensor, Tensor], tiles: Tiles) -> Tensor:
    """Mean mass of each pair of tiles of the grid, of one batch row, [H, visual_q, visual_k]."""
    q, k, _ = (x.double() for x in states)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])).softmax(-1)[0]
    block_of_q, block_of_k = token_blocks(tiles.q_order, tiles.block_q), token_blocks(tiles.k_order, tiles.block_k)
    mass = torch.zeros(HEADS, tiles.n_q, tiles.n_k, dtype=torch.float64)
    for i in range(weights.shape[1]):
        mass[:, block_of_q[i]].index_add_(-1, block_of_k, weights[:, i])
    return mass[:, : tiles.visual_q, : tiles.visual_k]


@pytest.mark.parametrize("extra", [{}, {"proxies": {}}, {"statistics": {"ramp": 0.0}}], ids=str)
def test_the_residual_of_a_step_gives_its_dense_output_back(extra: dict[str, Any]) -> None:
    run = Run(residual={"storage": "full"}, **extra)
    run.call(0)
    run.call(1, seed=1)
    out, states = run.call(2, seed=1)
    wanted, _ = dense(*states)
    tolerance = 2e-3 if "statistics" in extra else 5e-6  # statistics are kept in fp16
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
    other, states = run.call(3, seed=5)
    assert (other - dense(*states)[0]).norm() > 0.1 * other.norm()


@pytest.mark.parametrize("storage", ["token", "block"])
def test_statistics_of_a_step_give_its_dense_denominator_back(storage: str) -> None:
    run = Run(statistics={"ramp": 0.04, "storage": storage}, proxies=None)
    run.call(0)
    run.call(1, seed=1)
    seen = run.router.compensation._lists(LAYOUT, (NEAR,) * HEADS, torch.device("cpu")).to_mask()
    for number, step in enumerate((2, 3, 4)):
        out, states = run.call(step, seed=1)
        q, k, v = (x.double() for x in states)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM)
        _, dense_lse = dense(*states)
        log_rho = scores.masked_fill(~seen, -torch.inf).logsumexp(-1) - dense_lse
        if storage == "block":
            block_of = token_blocks(run.tiles.q_order, run.tiles.block_q)
            means = torch.stack([log_rho[..., block_of == n].mean(-1) for n in range(run.tiles.n_q)], -1)
            log_rho = means[..., block_of]
        rho = log_rho.exp() + 0.04 * number
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) * rho[..., None]
        wanted = torch.einsum("bhij,bjhd->bihd", weights, v)
        torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=2e-3)


def test_a_refresh_measures_again_and_its_output_is_dense() -> None:
    run = Run(total=8, residual={"refresh": 2, "storage": "full"})
    for step in range(8):
        out, states = run.call(step, seed=step)
        error = (out - dense(*states)[0]).norm() / out.norm()
        assert (error < 1e-5) == (step in (0, 1, 3, 5)), step
    assert (run.stats.dense, run.stats.measured, run.stats.compensated) == (1, 3, 4)


def test_a_new_choice_makes_the_residual_new() -> None:
    run = Run(
        total=8,
        patterns={"mass": TopK(share=0.2, refresh=(4,), sample=1)},
        default="mass",
        residual={"storage": "full"},
    )
    for step in range(5):
        run.call(step, seed=step)
    out, states = run.call(5, seed=4)
    torch.testing.assert_close(out, dense(*states)[0], atol=5e-6, rtol=1e-4)


def test_new_statistics_make_the_residual_new() -> None:
    run = Run(total=8, statistics={"refresh": (4,), "ramp": 0.0}, residual={"storage": "full"})
    for step in range(5):
        run.call(step, seed=step)
    out, states = run.call(5, seed=4)
    torch.testing.assert_close(out, dense(*states)[0], atol=2e-3, rtol=2e-3)


def test_heads_mix_patterns_selectors_and_nothing() -> None:
    run = Run(
        patterns={"near": NEAR, "mass": TopK(share=0.25, sample=1), "none": Skip()},
        assignment=[{"pattern": "mass", "heads": [1]}, {"pattern": "none", "heads": [2]}],
        proxies={},
    )
    run.call(0)
    _, states = run.call(1, seed=1)
    out, later = run.call(2, seed=2)
    mass = tile_mass(states, run.tiles)[1]
    count = max(1, round(0.25 * run.tiles.visual_k))
    seen = near_tiles(run).clone()
    seen[1] = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(count).indices, True)
    wanted, _ = definition(later, seen, run.tiles, parts_of(run))
    torch.testing.assert_close(out[:, :, :2].double(), wanted[:, :, :2], atol=2e-6, rtol=1e-5)
    assert not out[:, :, 2].any()


def test_a_layer_of_skipped_heads_gives_what_its_residual_says() -> None:
    run = Run(patterns={"none": Skip()}, default="none", proxies={}, residual={"storage": "full"})
    run.call(0)
    wanted, _ = run.call(1, seed=1)
    out, _ = run.call(2, seed=2)
    torch.testing.assert_close(out, wanted)


def test_rows_of_a_batch_choose_for_themselves() -> None:
    plan = {"patterns": {"mass": TopK(share=0.25, sample=1)}, "default": "mass", "proxies": {}, "residual": {}}
    both = Run(**plan)
    for step in (0, 1, 2):
        out, _ = both.call(step, seed=step, batch=2)
    for row in range(2):
        alone = Run(**plan)
        for step in (0, 1, 2):
            alone_states = tuple(x[row : row + 1] for x in inputs(step, batch=2))
            alone.router.clock.enter(Context(step, 6))
            alone.router.begin(LAYOUT, None, torch.device("cpu"))
            call = dict(zip(("query", "key", "value"), alone_states, strict=True))
            one = alone.router.routes[0].attention(call, lambda states=alone_states: dense(*states)[0], False)
        torch.testing.assert_close(out[row : row + 1], one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "sample", "agent"])
@pytest.mark.parametrize("levels", [1, 2])
def test_kinds_and_levels_are_dense_where_tiles_are_equal(kind: str, levels: int) -> None:
    """With one key and value for all, whatever stands in for tiles stands for the right number of tokens."""
    run = Run(proxies={"kind": kind, "levels": levels, "per_tile": 2}, dense_steps=0)
    q, k, v = inputs(0)
    visual = slice(LAYOUT.before, LAYOUT.before + LAYOUT.visual)
    k[:, visual], v[:, visual] = k[:, 7:8].clone(), v[:, 7:8].clone()
    run.router.begin(LAYOUT, None, torch.device("cpu"))
    out = run.router.routes[0].attention({"query": q, "key": k, "value": v}, lambda: q, False)
    torch.testing.assert_close(out, dense(q, k, v)[0], atol=2e-6, rtol=1e-5)
    if levels == 2:
        table = proxy_table(run.tiles, run.plan.proxies)
        assert table.parents > 0
        hidden = table.hidden(run.tiles.with_extra(near_tiles(run)))
        assert hidden.shape[-1] * 32 >= len(table.tile) + table.parents


def test_hidden_keys_count_for_nothing() -> None:
    run = Run(proxies={}, dense_steps=0)
    mask = torch.ones(1, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    mask[..., -3:] = False
    out, states = run.call(0, mask=mask)
    part = tuple(x.clone() for x in states)
    part[1][:, -3:], part[2][:, -3:] = 100.0, 100.0
    again = Run(proxies={}, dense_steps=0)
    again.router.begin(LAYOUT, None, torch.device("cpu"))
    call = dict(zip(("query", "key", "value"), part, strict=True)) | {"attn_mask": mask}
    assert torch.equal(out, again.router.routes[0].attention(call, lambda: out, False))
    near, _ = definition(states, near_tiles(run), run.tiles, parts_of(run))
    assert not torch.allclose(out.double(), near, atol=1e-3)


# ---- state -----------------------------------------------------------------------------------------------------------

REUSED: dict[str, Any] = {
    "patterns": {"mass": TopK(share=0.2, sample=1)},
    "default": "mass",
    "proxies": {},
    "residual": {"storage": "full"},
}


def is_dense(out: Tensor, states: tuple[Tensor, Tensor, Tensor]) -> bool:
    return bool((out - dense(*states)[0]).norm() < 1e-5 * out.norm())


def test_a_run_keeps_nothing_of_the_one_before() -> None:
    run = Run(**REUSED)
    first = [run.call(step, seed=step)[0] for step in range(6)]
    assert not run.router.compensation.states  # freed with the last step
    for _ in range(5):
        assert all(torch.equal(run.call(step, seed=step)[0], first[step]) for step in range(6))


def test_an_interrupted_run_leaves_nothing() -> None:
    run = Run(**REUSED)
    wanted = [run.call(step, seed=step)[0] for step in range(6)]
    for step in range(4):
        run.call(step, seed=100 + step)
    assert run.router.compensation.states
    for step in range(6):
        assert torch.equal(run.call(step, seed=step)[0], wanted[step])


def test_branches_do_not_mix() -> None:
    run = Run(**REUSED)
    outs = {}
    for step in range(3):
        for branch, seed in (("cond", step), ("uncond", 50 + step)):
            outs[branch], _ = run.call(step, seed=seed, branch=branch)
    for branch, start in (("cond", 0), ("uncond", 50)):
        alone = Run(**REUSED)
        for step in range(3):
            out, _ = alone.call(step, seed=start + step, branch=branch)
        assert torch.equal(out, outs[branch])


def test_what_does_not_fit_is_measured_again() -> None:
    run = Run(total=9, **REUSED)
    for step in range(3):
        run.call(step, seed=step)
    other = Layout((2, 10, 12), before=5, after=3)
    assert is_dense(*run.call(3, layout=other))  # another size
    assert not is_dense(*run.call(4, layout=other, seed=9))
    assert is_dense(*run.call(5, layout=other, batch=2))  # another batch, as when guidance ends
    assert not is_dense(*run.call(6, layout=other, batch=2, seed=9))


def test_a_layer_that_a_cache_skipped_is_measured_when_it_runs() -> None:
    run = Run(total=9, **REUSED | {"residual": {"refresh": (4,), "storage": "full"}})
    assert is_dense(*run.call(0))
    assert is_dense(*run.call(3, seed=3))  # the step of the measurement was skipped
    assert is_dense(*run.call(6, seed=6))  # and so was the refresh
    assert not is_dense(*run.call(7, seed=7))


def test_a_stage_with_other_patterns_is_measured_anew() -> None:
    run = Run(
        total=9,
        patterns={"near": NEAR, "far": Neighborhood(window=(3, 7, 7))},
        assignment=[{"pattern": "far", "steps": "5:"}],
        residual={"storage": "full"},
    )
    dense_at = [step for step in range(9) if is_dense(*run.call(step, seed=step))]
    assert dense_at == [0, 1, 5]


def test_statistics_without_dense_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_steps"):
        Run(statistics={}, dense_steps=0)
