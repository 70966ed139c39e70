"""Plans with compensations and selectors, layer by layer, against a definition written token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from visparse.compensation.proxy_table import proxy_table
from visparse.compensation.testing import (
    HEAD_DIM,
    HEADS,
    LAYOUT,
    NEAR,
    Run,
    States,
    dense,
    inputs,
    tile_mass,
    token_blocks,
)
from visparse.compensation.tiles import Tiles
from visparse.patterns import Skip, TopK


def definition(states: States, seen: Tensor, tiles: Tiles, parts: list[list[int]] | None) -> tuple[Tensor, Tensor]:
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
    out, _ = run.call(0, states=(q, k, v))
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
            q, k, v = (x[row : row + 1] for x in inputs(step, batch=2))
            one, _ = alone.call(step, states=(q, k, v))
        torch.testing.assert_close(out[row : row + 1], one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "sample", "agent"])
@pytest.mark.parametrize("levels", [1, 2])
def test_kinds_and_levels_are_dense_where_tiles_are_equal(kind: str, levels: int) -> None:
    """With one key and value for all, whatever stands in for tiles stands for the right number of tokens."""
    run = Run(proxies={"kind": kind, "levels": levels, "per_tile": 2}, dense_steps=0)
    q, k, v = inputs(0)
    visual = slice(LAYOUT.before, LAYOUT.before + LAYOUT.visual)
    k[:, visual], v[:, visual] = k[:, 7:8].clone(), v[:, 7:8].clone()
    out, _ = run.call(0, states=(q, k, v))
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
    q, k, v = (x.clone() for x in states)
    k[:, -3:], v[:, -3:] = 100.0, 100.0
    assert torch.equal(out, Run(proxies={}, dense_steps=0).call(0, states=(q, k, v), mask=mask)[0])
    near, _ = definition(states, near_tiles(run), run.tiles, parts_of(run))
    assert not torch.allclose(out.double(), near, atol=1e-3)
