"""Refresh by overlap: what is looked at, against plain definitions, and what a run does with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.choice import select
from visparse.compensation.overlap import choose_again, overlaps, sample_of
from visparse.compensation.refresh import Overlap
from visparse.compensation.testing import (
    BLOCKS,
    HEADS,
    LAYOUT,
    NEAR,
    Run,
    States,
    inputs,
    is_dense,
    tile_mass,
    token_blocks,
)
from visparse.compensation.tiles import tiles_for
from visparse.layout import Layout
from visparse.patterns import Pattern, Skip, TopK, TopP

RULE = Overlap(below=0.6)


def follow(rule: Overlap = RULE, total: int = 10, **plan: Any) -> Run:
    top = TopK(share=0.25, refresh=rule, sample=1)
    usual: dict[str, Any] = {"patterns": {"top": top, "near": NEAR}, "default": "top", "proxies": {}}
    return Run(total, **usual | {"residual": {"storage": "full", "refresh": rule}} | plan)


def drawn(seed: int, layout: Layout = LAYOUT, batch: int = 1) -> States:
    """Inputs whose heads look at other tiles with every seed."""
    q, k, v = inputs(seed, layout, batch)
    generator = torch.Generator().manual_seed(seed)
    aim = torch.randn(batch, 1, *q.shape[2:], generator=generator)
    tiles = tiles_for(layout, *BLOCKS, torch.device("cpu"), serpentine=True)
    place = torch.randn(batch, tiles.n_k, *q.shape[2:], generator=generator)
    return q + aim, k + 2 * place[:, token_blocks(tiles.k_order, tiles.block_k)], v


def play(run: Run, seeds: list[int], **call: Any) -> list[int]:
    """Call the layer at each step, with inputs of a seed; the steps whose outputs are dense."""
    return [step for step, seed in enumerate(seeds) if is_dense(*go(run, step, seed, **call))]


def go(run: Run, step: int, seed: int, batch: int = 1, **call: Any) -> tuple[Tensor, States]:
    return run.call(step, states=drawn(seed, call.get("layout", LAYOUT), batch), **call)


# ---- what is looked at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serpentine", [False, True])
def test_a_sample_is_a_few_tiles_spread_over_the_grid(serpentine: bool) -> None:
    tiles = tiles_for(Layout((21, 45, 80)), 128, 128, torch.device("cpu"), serpentine=serpentine)
    seen = []
    for layer in range(40):
        sample = sample_of(tiles, layer, 4)
        some = sample.tiles.tolist()
        assert len(some) == -(-tiles.visual_q // 64)
        assert 0 <= some[0] <= some[-1] < tiles.visual_q
        assert all(abs(later - one - tiles.visual_q / len(some)) < 1 for one, later in pairwise(some))
        assert (sample.order >= 0).sum() <= 0.005 * 75_600
        seen += some
    assert len(set(seen)) > 0.4 * tiles.visual_q  # layers look at other tiles


@pytest.mark.parametrize("serpentine", [False, True])
def test_a_sample_has_the_queries_of_its_tiles(serpentine: bool) -> None:
    tiles = tiles_for(LAYOUT, 64, 32, torch.device("cpu"), serpentine=serpentine)
    for layer in range(8):
        for every in (1, 4):
            sample = sample_of(tiles, layer, every)
            (tile,) = sample.tiles.tolist()
            wanted = [t for t in tiles.q_order.view(-1, 64)[tile].tolist() if t >= 0][::every]
            assert sample.tokens[sample.order >= 0].tolist() == wanted
            assert sample.width == 64 // every


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_the_overlap_against_its_definition(every: int, masked: bool) -> None:
    run = follow()
    tiles, top = run.tiles, TopK(share=0.4, refresh=RULE, sample=every)
    nucleus = TopP(mass=0.5, least=0.1, most=0.9, refresh=RULE, sample=every)
    patterns: tuple[Pattern, ...] = (top, NEAR, nucleus)
    old = torch.rand(1, 2, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(3)) < 0.5
    for seed in range(3):
        states = inputs(seed)
        mask = torch.ones(1, 1, 1, LAYOUT.tokens, dtype=torch.bool)
        mask[..., 40:70] = not masked
        bias = torch.zeros(1, 1, LAYOUT.tokens).masked_fill(~mask[:, :, 0], -torch.inf) if masked else None
        found = overlaps(Call(*states, bias, None), tiles, seed, ("a", "b", "c"), patterns, old, "auto")
        mass = tile_mass(states, tiles, every, mask)
        (tile,) = sample_of(tiles, seed, every).tiles.tolist()
        wanted = []
        for head, selector, place in ((0, top, 0), (2, nucleus, 1)):
            new = select(selector, mass[head, tile].float())
            wanted.append(float((new & old[0, place, tile]).sum() / new.sum()))
        assert found.tolist() == pytest.approx(wanted)


def test_a_spread_budget_keeps_the_number_of_each_row() -> None:
    scores = torch.rand(1, 2, 5, 12, generator=torch.Generator().manual_seed(0))
    old = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    new = choose_again(TopK(share=0.4, spread=True), scores, old)
    assert torch.equal(new.sum(-1), old.sum(-1))
    assert scores.masked_fill(~new, 2.0).amin(-1).ge(scores.masked_fill(new, -1.0).amax(-1)).all()
    whole = select(TopK(share=0.4, spread=True), scores)
    assert torch.equal(choose_again(TopK(share=0.4, spread=True), scores, whole), whole)


def test_heads_without_such_a_refresh_are_not_looked_at() -> None:
    run = follow()
    old = torch.ones(1, 2, run.tiles.visual_q, run.tiles.visual_k, dtype=torch.bool)
    patterns = (TopK(share=0.2), Skip(), TopK(share=0.2, refresh=4))
    assert overlaps(Call(*inputs(0), None, None), run.tiles, 0, "abc", patterns, old, "auto").numel() == 0


# ---- what a run does with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["mass", "mass_variance"])
@pytest.mark.parametrize("spread", [False, True])
def test_attention_that_does_not_change_is_measured_once(score: str, spread: bool) -> None:
    top = TopK(share=0.25, refresh=Overlap(below=0.95), sample=4, score=score, spread=spread)
    run = Run(10, patterns={"top": top}, default="top", proxies={})
    for step in range(10):
        go(run, step, 0)
    assert (run.stats.dense, run.stats.measured, run.stats.compensated) == (1, 1, 8)
    watch = run.serving.watch
    assert watch.refreshed == []
    assert watch.overlaps == {step: 1.0 for step in range(2, 8)}  # at steps 8 and 9 a refresh would serve nothing


def test_a_change_is_answered_at_the_next_step_and_only_there() -> None:
    run = follow(residual=None)
    assert play(run, [0] * 5 + [7] * 5) == [0, 1, 6]
    watch = run.serving.watch
    assert watch.refreshed == [6]
    assert watch.overlaps[5] < 0.6
    assert [watch.overlaps[step] for step in (2, 3, 4, 7)] == [1.0] * 4
    assert 6 not in watch.overlaps


def test_all_that_goes_by_the_overlap_is_measured_then() -> None:
    """A window layer, without a choice of its own, follows with its residual."""
    rule = {"overlap_below": 0.6}
    run = follow(residual={"storage": "full", "refresh": rule}, assignment=[{"pattern": "near", "layers": 1}])
    seeds = [0, 1, 2, 2, 2, 7, 8, 8, 8, 8]
    assert play(run, seeds, layers=(0, 1)) == [0, 1, 3, 4, 6, 7, 8, 9]  # 4, 7, 8, 9: the residual fits exactly
    assert run.serving.watch.refreshed == [3, 6]
    assert [run.router.routes[layer].stats.measured for layer in (0, 1)] == [3, 3]


def test_the_residual_is_that_of_the_new_measurement() -> None:
    run = follow()
    assert play(run, [0] * 5 + [7] * 5) == [0, 1, 2, 3, 4, 6, 7, 8, 9]  # same inputs: dense minus sparse fits exactly


def test_branches_agree() -> None:
    run = follow(Overlap(below=0.75), residual=None)
    found: dict[str, list[int]] = {"cond": [], "uncond": []}
    for step in range(10):
        for branch, seed in (("cond", 0), ("uncond", 50 + 20 * (step >= 5))):
            if is_dense(*go(run, step, seed, branch=branch)):
                found[branch].append(step)
    half = run.serving.watch.overlaps[5]  # one branch has changed, the other has not
    assert 0.5 <= half < 0.75
    assert found == {"cond": [0, 1, 6], "uncond": [0, 1, 6]}


def test_rows_of_a_batch_are_looked_at_too() -> None:
    run = follow(residual=None)
    seeds = [0] * 5 + [7] * 5
    assert play(run, seeds, batch=2) == [0, 1, 6]


def test_how_often() -> None:
    changing = list(range(12))
    assert play(follow(total=12, residual=None), changing) == [0, 1, 3, 5, 7, 9]  # 11 would serve no step
    assert play(follow(Overlap(every=3), total=12, residual=None), changing) == [0, 1, 5, 9]
    assert play(follow(Overlap(most=2), total=12, residual=None), changing) == [0, 1, 3, 5]
    limited = follow(Overlap(most=1), total=12, residual=None)
    play(limited, changing)
    assert list(limited.serving.watch.overlaps) == [2]
    assert play(follow(total=4, residual=None), changing[:4]) == [0, 1]
    late = follow(total=12, residual=None, dense_steps={"first": 2, "last": 7})
    assert play(late, changing) == [0, 1, 3, *range(5, 12)]


def test_a_run_begins_without_what_the_last_one_found() -> None:
    run = follow(residual=None)
    seeds = [0] * 5 + [7] * 5
    wanted = [go(run, step, seed)[0] for step, seed in enumerate(seeds)]
    for step in range(7):
        go(run, step, 100 + step)  # stopped after a look
    assert all(torch.equal(go(run, step, seed)[0], wanted[step]) for step, seed in enumerate(seeds))
    assert run.serving.watch.refreshed == [6]


def test_a_layer_that_a_cache_skipped_is_measured_when_it_runs() -> None:
    run = follow(residual=None)
    play(run, [0, 0, 7], layers=(0, 1))
    assert run.serving.watch._count == 2 * HEADS
    go(run, 3, 7)  # measured again, without layer 1
    assert run.serving.watch.refreshed == [3]
    assert is_dense(*go(run, 4, 7, layers=(0, 1)))
    assert not is_dense(*go(run, 5, 7))
    assert not is_dense(*go(run, 6, 7, layers=(0, 1)))


def test_steps_that_a_cache_skipped_do_not_matter() -> None:
    run = follow(residual=None, total=12)
    for step, seed in ((0, 0), (1, 0), (2, 7)):
        go(run, step, seed)
    assert is_dense(*go(run, 6, 7))  # the next one that runs
    assert run.serving.watch.refreshed == [6]


def test_another_size_is_measured_anew_and_looked_at() -> None:
    run = follow(residual=None)
    other = Layout((2, 10, 12), before=5, after=3)
    play(run, [0] * 3)
    found = [is_dense(*go(run, step, seed, layout=other)) for step, seed in ((3, 0), (4, 0), (5, 7), (6, 7), (7, 7))]
    assert found == [True, False, False, True, False]


def test_copies_begin_without_what_was_found() -> None:
    run = follow()
    play(run, [0, 0, 7])
    copied = run.serving.__getstate__()["watch"]
    assert (copied.rule, copied._sums, copied.overlaps) == (RULE, [], {})


def test_one_number_is_read_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = follow(residual=None), []
    plain = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda x: read.append(run.router.clock.step) or plain(x))
    for step in range(10):
        for branch in ("cond", "uncond"):
            go(run, step, 0, branch=branch)
    assert read == list(range(3, 9))
