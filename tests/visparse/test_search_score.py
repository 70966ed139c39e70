"""Scores of candidates: the same numbers as the kernels give for whole sequences, and as plain fp64 gives."""

import pytest
import torch

from visparse.compensation import Proxies
from visparse.compensation.call import Call
from visparse.compensation.choice import choose_by_content, choose_tiles, select
from visparse.compensation.proxy_table import proxy_table
from visparse.compensation.tiles import tiles_for
from visparse.head_search.candidates import Candidate, Candidates, make_candidates
from visparse.head_search.rows import kept_keys, kept_tiles, sample_rows
from visparse.head_search.score import Scorer
from visparse.layout import Layout
from visparse.patterns import Dense, Neighborhood, Skip, SpatialHead, TopK
from visparse_kernels import attend, attend_proxies, block_scores, pool_tokens
from visparse_kernels.lists import BlockLists

GRID, HEADS, SIZE = (2, 14, 16), 3, 16
WINDOW = Neighborhood(window=(1, 5, 5))
TOP = TopK(share=0.25, score="mass_variance")
PLAIN = (Dense(), Skip(), WINDOW, SpatialHead(width=0.5))
FOVEAL = (Dense(), Skip(), WINDOW, TOP)


def make_call(layout, seed, bias=False):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, layout.tokens, HEADS, SIZE, generator=generator) for _ in range(3))
    hidden = torch.zeros(1, 1, layout.tokens)
    hidden[..., -3:] = -torch.inf
    return Call(2 * q, 2 * k, v, hidden if bias else None, None)


def make_scorer(count=None, every=1, foveal=FOVEAL):
    kept = [Candidate(f"p{i}", "plain", one) for i, one in enumerate(PLAIN)]
    kept += [Candidate(f"f{i}", "foveal", one) for i, one in enumerate(foveal)]
    return Scorer(Candidates(kept=tuple(kept), left_out={}), count=count, every=every, seed=0, head_dim=SIZE)


def attention(call, mask):
    """Plain masked attention in fp64: mask [N, N]."""
    q, k, v = (x[0].transpose(0, 1).double() for x in (call.q, call.k, call.v))
    logits = q @ k.transpose(1, 2) * SIZE**-0.5
    if call.bias is not None:
        logits = logits + call.bias[0].double()[:, None]
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v  # [H, N, D]


def by_kernels(call, layout, pattern, lse, choice=None, serpentine=True):
    """Output of a foveal head as a sparse step computes it, and what it chose; plans with selectors are serpentine."""
    tiles = tiles_for(layout, 128, 128, torch.device("cpu"), serpentine=serpentine)
    if isinstance(pattern, Skip):
        return torch.zeros_like(call.q), None
    if isinstance(pattern, TopK) and choice is None:
        orders = {"q_order": tiles.q_order, "k_order": tiles.k_order, "block_q": 128, "block_k": 128}
        scores = block_scores(call.q, call.k, lse, kind=pattern.score, sample=4, key_bias=call.bias, **orders)
        choice = select(pattern, scores[..., : tiles.visual_q, : tiles.visual_k])
    static = {} if isinstance(pattern, TopK) else {pattern: tiles.widen(pattern)}
    table = proxy_table(tiles, Proxies())
    made = choose_tiles(tiles, [pattern] * HEADS, choice, static, table)
    out, seen = attend(call.q, call.k, call.v, made.lists, key_bias=call.bias, return_lse=True)
    pooled = pool_tokens(call.k, call.v, table.members, key_bias=call.bias)
    group = made.lists.head_group
    out, _ = attend_proxies(call.q, out, seen, *pooled, made.hidden, group, tiles.q_order[None], 128)
    return out, choice


@pytest.mark.parametrize(("before", "bias", "serpentine"), [(0, False, True), (5, True, True), (5, True, False)])
def test_scores_are_those_of_whole_outputs(before, bias, serpentine):
    foveal = FOVEAL if serpentine else tuple(one for one in FOVEAL if one != TOP)
    layout = Layout(GRID, before=before)
    first, later = make_call(layout, 1, bias), make_call(layout, 2, bias)
    later = later._replace(q=first.q + 0.3 * later.q, k=first.k + 0.3 * later.k, v=first.v + 0.3 * later.v)
    weight = torch.randn(20, HEADS * SIZE, generator=torch.Generator().manual_seed(3))
    scorer = make_scorer(foveal=foveal)
    scorer.measure("key", first, layout)
    found = scorer.judge("key", later, layout, weight)

    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    dense = {name: attention(call, everything) for name, call in (("first", first), ("later", later))}
    columns = weight.double().view(20, HEADS, SIZE)
    whole = torch.einsum("ohd,hnd->no", columns, dense["later"]).square().sum()

    def relative(delta):  # [H, N, D]
        return torch.einsum("ohd,hnd->hno", columns, delta).square().sum((1, 2)) / whole

    coordinates = layout.coordinates()
    for place, pattern in enumerate(PLAIN):
        mask = everything.clone()
        grid = slice(before, before + layout.visual)
        mask[grid, grid] = pattern.pairs(coordinates[:, None], coordinates[None], GRID)
        out = torch.zeros_like(dense["later"]) if isinstance(pattern, Skip) else attention(later, mask)
        delta = dense["later"] - out
        torch.testing.assert_close(torch.tensor(found["error"][place]).double(), relative(delta), rtol=1e-4, atol=1e-9)
        mse = delta.square().mean((1, 2))
        torch.testing.assert_close(torch.tensor(found["mse"][place]).double(), mse, rtol=1e-4, atol=1e-9)

    lists = BlockLists.dense(q_len=layout.tokens, k_len=layout.tokens, heads=HEADS, block_q=64, block_k=64)
    _, lse = attend(first.q, first.k, first.v, lists, key_bias=first.bias, return_lse=True)
    for place, pattern in enumerate(foveal):
        out, choice = by_kernels(first, layout, pattern, lse, None, serpentine)
        residual = dense["first"] - out[0].transpose(0, 1).double()
        out, _ = by_kernels(later, layout, pattern, None, choice, serpentine)
        delta = dense["later"] - out[0].transpose(0, 1).double() - residual
        score = torch.tensor(found["error"][len(PLAIN) + place]).double()
        torch.testing.assert_close(score, relative(delta), rtol=1e-3, atol=1e-9)
        assert found["mse"][len(PLAIN) + place] is None


@pytest.mark.parametrize(("before", "bias"), [(0, False), (5, True)])
def test_tiles_by_pooled_scores_are_those_that_a_plan_chooses(before, bias):
    layout = Layout(GRID, before=before)
    call = make_call(layout, 1, bias)
    selectors = [TopK(share=0.25, score="pooled"), TopK(share=0.5, score="pooled", parts=8)]
    kept = [Candidate(f"p{i}", "pooled", one) for i, one in enumerate(selectors)]
    scorer = Scorer(Candidates(kept=tuple(kept), left_out={}), count=None, every=1, seed=0, head_dim=SIZE)
    found = scorer.judge("key", call, layout, None)
    dense = attention(call, torch.ones(layout.tokens, layout.tokens, dtype=torch.bool))
    tiles = tiles_for(layout, 128, 128, torch.device("cpu"), serpentine=True)
    for selector, error in zip(selectors, found["error"], strict=True):
        choice = choose_by_content(call, tiles, ["a"] * HEADS, [selector] * HEADS, None, None)
        out, _ = by_kernels(call, layout, selector, None, choice)
        wanted = (dense - out[0].transpose(0, 1)).square().sum((1, 2)) / dense.square().sum()
        torch.testing.assert_close(torch.tensor(error).double(), wanted, rtol=1e-3, atol=1e-9)


def test_parts_of_heads_and_tiles_give_the_same_scores(monkeypatch):
    layout = Layout(GRID)
    whole, parted = make_scorer(every=2), make_scorer(every=2)
    found = []
    for scorer, numbers in ((whole, 1 << 26), (parted, 40_000)):
        monkeypatch.setattr("visparse.head_search.score._NUMBERS", numbers)
        scorer.measure("key", make_call(layout, 1), layout)
        found.append(scorer.judge("key", make_call(layout, 2), layout, None))
    assert len(list(parted._parts(make_call(layout, 1), parted._of(layout, torch.device("cpu")).rows))) > 3
    for name in ("error", "mse"):
        for one, other in zip(*(result[name] for result in found), strict=True):
            assert one == other if one is None else one == pytest.approx(other, rel=1e-5, abs=1e-12)


def test_a_candidate_that_was_not_measured_is_left_out():
    layout = Layout(GRID)
    found = make_scorer(count=2).judge("key", make_call(layout, 1), layout, None)
    assert [row is None for row in found["error"]] == [False] * len(PLAIN) + [True] * len(FOVEAL)


def test_rows_are_spread_and_follow_the_seed():
    tiles = tiles_for(Layout((4, 16, 16), before=3), 128, 128, torch.device("cpu"))
    rows = sample_rows(tiles, 4, 4, seed=1)
    assert rows.tokens.shape == (5, 32)
    assert [int(block) // 2 for block in rows.blocks[:4]] == [0, 1, 2, 3]
    assert rows.tokens[4].tolist()[:2] == [0, -1]
    assert torch.equal(rows.tokens, sample_rows(tiles, 4, 4, seed=1).tokens)
    assert any(not torch.equal(rows.blocks, sample_rows(tiles, 4, 4, seed=s).blocks) for s in range(2, 6))
    assert len(sample_rows(tiles, None, 1, seed=0).blocks) == tiles.n_q


@pytest.mark.parametrize("serpentine", [False, True])
def test_what_patterns_keep_for_rows_is_part_of_the_whole(serpentine):
    layout = Layout(GRID, before=2, after=1)
    tiles = tiles_for(layout, 128, 128, torch.device("cpu"), serpentine=serpentine)
    rows = sample_rows(tiles, 2, 4, seed=0)
    slots = tiles.k_order.long()
    kept = kept_keys(rows, WINDOW).view(*rows.tokens.shape, -1)
    at = layout.coordinates()
    for tile, tokens in enumerate(rows.tokens):
        for place, token in enumerate(tokens.tolist()):
            if token < 0:
                continue
            for slot in range(0, len(slots), 37):
                key = int(slots[slot])
                inside = layout.before <= key < layout.before + layout.visual
                grid = layout.before <= token < layout.before + layout.visual
                wanted = key < 0 or not inside or not grid
                if inside and grid:
                    wanted = bool(WINDOW.pairs(at[token - layout.before], at[key - layout.before], GRID))
                if key >= 0:
                    assert bool(kept[tile, place, slot]) == wanted
    assert torch.equal(kept_tiles(rows, WINDOW), tiles.with_extra(tiles.widen(WINDOW))[rows.blocks])


def test_candidates_fit_the_grid_or_say_why_not():
    small = make_candidates(Layout((1, 8, 8)), ["plain", "foveal"])
    names = [(one.family, one.name) for one in small.kept]
    assert len(names) == len(set(names))
    for family in ("plain", "foveal"):
        patterns = [small.kept[place].pattern for place in small.of(family)]
        assert Dense() in patterns
        assert Skip() in patterns
        assert any(isinstance(one, TopK) for one in patterns) == (family == "foveal")
    assert "needs" in small.left_out["spatial_2"] or "wanted" in small.left_out["spatial_2"]
    content = [one.pattern for one in make_candidates(Layout((4, 16, 16)), ["pooled"], names=["pooled"]).kept[2:]]
    assert {(one.score, one.parts) for one in content} == {("pooled", 8)}
    few = make_candidates(Layout((4, 16, 16)), ["plain"], names=["tube"])
    assert [one.name for one in few.kept] == ["dense", "skip", "tube8", "tube4", "tube2"]
    with pytest.raises(ValueError, match=r"candidates: no candidate begins with 'tubes'; known: dense, .*tube8"):
        make_candidates(Layout((4, 16, 16)), ["plain"], names=["tubes"])
    with pytest.raises(ValueError, match="family: wanted some of plain, foveal, pooled, got 'fovea'"):
        make_candidates(Layout((4, 16, 16)), ["fovea"])
