"""Tiles that are runs of a serpentine curve: every token once, little padding, and the plans that get them."""

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from visparse.compensation.config import Proxies
from visparse.compensation.proxy_table import proxy_table
from visparse.compensation.tiles import Tiles, tiles_for, tiles_of_plan
from visparse.head_search.build import build_plan
from visparse.head_search.candidates import make_candidates
from visparse.head_search.costs import make_costs
from visparse.head_search.score import Scorer
from visparse.layout import Grid, Layout, coordinates
from visparse.patterns import Dense, Neighborhood, Pattern, Skip, TemporalHead, TopK, TopP
from visparse.plan import SparsePlan
from visparse.presets import foveal, neighborhood
from visparse.rules import ModelFingerprint

CPU = torch.device("cpu")
LAYOUTS = [
    Layout((5, 11, 13), before=3, after=40),
    Layout((4, 16, 16)),
    Layout((1, 20, 23), after=7),
    Layout((3, 1, 7), before=70),
    Layout((1, 37, 37), before=1),
    Layout((1, 20, 20), before=2, after=5),
]
BLOCKS = [(64, 32), (192, 128), (96, 64), (128, 128)]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_slot_and_only_last_tiles_have_padding(layout: Layout, blocks: tuple[int, int]) -> None:
    tiles = tiles_for(layout, *blocks, CPU, serpentine=True)
    assert (tiles.boxes, tiles.q_box, tiles.k_box) == (None, None, None)
    for order, block, visual, count in (
        (tiles.q_order, blocks[0], tiles.visual_q, tiles.n_q),
        (tiles.k_order, blocks[1], tiles.visual_k, tiles.n_k),
    ):
        assert order.dtype == torch.int32
        assert sorted(order[order >= 0].tolist()) == list(range(layout.tokens))
        rows = order.view(-1, block)
        grid, extra = rows[:visual], rows[visual:]
        inside = (grid >= layout.before) & (grid < layout.before + layout.visual)
        assert torch.equal(inside, grid >= 0)
        few, last = layout.tokens - layout.visual, layout.visual % block
        if few and last and last + few <= block and layout.visual > 2 * block:
            assert (visual, count) == (layout.visual // block, layout.visual // block + 1)
            assert bool(inside.all())
            assert {*range(layout.before), *range(layout.before + layout.visual, layout.tokens)} <= set(
                extra[0].tolist()
            )
            assert extra[0, : last + few].min() >= 0
            continue
        assert visual == ceil(layout.visual / block)
        assert bool(inside[:-1].all())
        assert inside[-1].tolist() == sorted(inside[-1].tolist(), reverse=True)
        assert count - visual == ceil(layout.before / block) + ceil(layout.after / block)
        end = layout.before + layout.visual
        wanted = [*range(layout.before), *range(end, layout.tokens)]
        assert extra[extra >= 0].tolist() == wanted
        sides = (extra >= end).any(1) & ((extra >= 0) & (extra < layout.before)).any(1)
        assert not bool(sides.any())  # tokens before and after never share a block


def test_queries_and_keys_are_cut_from_one_curve() -> None:
    """Tiles of 192 queries and of 128 keys hold the same stretch after 384 tokens."""
    tiles = tiles_for(Layout((13, 30, 45)), 192, 128, CPU, serpentine=True)
    for number in range(0, 40, 7):
        q, k = (order[number * 384 : (number + 1) * 384].sort().values for order in (tiles.q_order, tiles.k_order))
        assert torch.equal(q, k)


def test_a_video_has_a_fifth_fewer_blocks_than_with_boxes() -> None:
    """Of the map of attention, whose blocks are pairs of tiles."""
    layout = Layout((21, 45, 80))
    boxes, runs = (tiles_for(layout, 128, 128, CPU, serpentine=serpentine) for serpentine in (False, True))
    assert (runs.n_q, runs.n_k) == (591, 591)  # 590.6 of 128 tokens: no fewer are possible
    assert boxes.boxes is not None
    assert runs.n_q * runs.n_k / (boxes.n_q * boxes.n_k) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("serpentine", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_parts_of_a_tile_are_equal_and_compact(block: int, serpentine: bool) -> None:
    layout = Layout((8, 17, 30), before=3)
    tiles = tiles_for(layout, 64, block, CPU, serpentine=serpentine)
    keys = tiles.keys[(tiles.keys >= 0).all(1)].long() - layout.before
    at = coordinates(keys, layout.grid).double()
    whole = float(at.var(1, correction=0).sum(-1).mean())
    for count in (1, 2, 4, 8, 16):
        parts = tiles.parts(count)
        assert parts.bincount().tolist() == [block // count] * count
        inside = [float(at[:, parts == part].var(1, correction=0).sum(-1).mean()) for part in range(count)]
        assert sum(inside) / count < whole * (1.0, 0.72, 0.5, 0.35, 0.25)[count.bit_length() - 1] + 1e-9
    assert sorted(tiles.parts(block).tolist()) == list(range(block))


@pytest.mark.parametrize("per_tile", [1, 2, 8, 16])
def test_proxies_stand_for_parts_of_runs(per_tile: int) -> None:
    layout = Layout((5, 11, 13), before=3, after=40)
    tiles = tiles_for(layout, 64, 32, CPU, serpentine=True)
    table = proxy_table(tiles, Proxies(per_tile=per_tile))
    members = [[token for token in row if token >= 0] for row in table.members.tolist()]
    tokens = sorted(token for row in members for token in row)
    assert tokens == list(range(layout.before, layout.before + layout.visual))
    for row, tile in zip(members, table.tile.tolist(), strict=True):
        assert row
        assert set(row) <= set(tiles.keys[tile].tolist())


def test_neighbourhoods_have_eight_tiles_in_a_row() -> None:
    tiles = tiles_for(Layout((5, 11, 13), before=3, after=40), 64, 32, CPU, serpentine=True)
    parents = tiles.parents()
    assert tiles.visual_k == 23
    assert parents.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    assert proxy_table(tiles, Proxies(levels=2)).parents == 3
    boxes = tiles_for(Layout((4, 16, 16)), 32, 32, CPU)
    assert boxes.visual_k == 32
    assert boxes.parents().bincount().tolist() == [8] * 4
    for parent in range(4):  # 2 x 2 x 2 of them are one box
        at = coordinates(boxes.keys[boxes.parents() == parent].flatten().long(), (4, 16, 16))
        assert int((at.amax(0) - at.amin(0) + 1).prod()) == len(at) == 8 * 32


def brute_force(tiles: Tiles, pattern: Pattern) -> Tensor:
    """Pairs of tiles of which some pair of tokens is kept, bool [visual_q, visual_k]."""
    layout = tiles.layout
    at = layout.coordinates()
    kept = pattern.pairs(at[:, None], at[None], layout.grid).expand(layout.visual, layout.visual)
    rows = [
        [[token - layout.before for token in row if token >= 0] for row in order.view(-1, block)[:count].tolist()]
        for order, block, count in (
            (tiles.q_order, tiles.block_q, tiles.visual_q),
            (tiles.k_order, tiles.block_k, tiles.visual_k),
        )
    ]
    return torch.tensor([[bool(kept[q][:, k].any()) for k in rows[1]] for q in rows[0]])


@pytest.mark.parametrize("layout", [LAYOUTS[0], Layout((4, 16, 16), before=3)])
@pytest.mark.parametrize("window", [(1, 11, 13), (5, 1, 13), (5, 11, 3), (1, 11, 3), (1, 3, 13), (3, 5, 5)])
def test_widened_windows_miss_nothing(layout: Layout, window: Grid) -> None:
    """Exactly what brute force finds where one axis is cut.

    Tiles of a curve are no boxes: `cover` bounds each axis on its own, so windows that cut several may keep some more.
    """
    sides = [min(side, length) for side, length in zip(window, layout.grid, strict=True)]
    near = Neighborhood(window=(sides[0], sides[1], sides[2]))
    tiles = tiles_for(layout, 64, 32, CPU, serpentine=True)
    found, wanted = tiles.widen(near), brute_force(tiles, near)
    assert not bool((wanted & ~found).any())
    cut = sum(side < length for side, length in zip(sides, layout.grid, strict=True))
    assert cut > 0
    more = int(found.sum()) / int(wanted.sum())
    assert more == 1 if cut == 1 else more < 1.15


@pytest.mark.parametrize(
    "pattern", [Dense(), Skip(), TemporalHead(width=0.5), TopK(share=0.5)], ids=lambda one: one.name
)
def test_widened_patterns_against_brute_force(pattern: Pattern) -> None:
    tiles = tiles_for(LAYOUTS[2], 64, 32, CPU, serpentine=True)
    wanted = brute_force(tiles, pattern)
    assert torch.equal(tiles.widen(pattern), wanted)


def plan_of(*patterns: Pattern, **changes: Any) -> SparsePlan:
    """A plan whose heads have these patterns, one each."""
    table = {f"p{number}": pattern for number, pattern in enumerate(patterns)}
    usual: dict[str, Any] = {"name": "own", "patterns": table, "default": "p0", "dense_steps": 1}
    usual["assignment"] = [{"pattern": name, "heads": number} for number, name in enumerate(table)]
    return SparsePlan(**usual | changes)


NEAR = Neighborhood(window=(3, 5, 5))


@pytest.mark.parametrize(
    ("plan", "serpentine"),
    [
        (foveal(), True),
        (plan_of(TopP(mass=0.5)), True),
        (plan_of(NEAR, TopK(share=0.5, score="pooled")), True),
        (plan_of(NEAR, proxies={}), False),
        (plan_of(NEAR, Skip(), Dense(), proxies={}, residual={}), False),
        (neighborhood(), False),
        (plan_of(TopK(share=0.5), proxies={"tiles": "boxes"}), False),
        (plan_of(NEAR, proxies={"tiles": "serpentine"}), True),
    ],
    ids=[
        "foveal",
        "top_p",
        "window and top_k",
        "window",
        "windows and nothing",
        "neighborhood",
        "top_k, boxes asked for",
        "window, runs asked for",
    ],
)
def test_a_plan_that_chooses_by_content_has_runs_and_others_have_boxes(plan: SparsePlan, serpentine: bool) -> None:
    layout = Layout((5, 11, 13), before=3)
    tiles = tiles_of_plan(plan, layout, 64, CPU, block_q=64, block_k=32)
    assert (tiles.boxes is None) == (tiles.k_box is None) == serpentine
    assert tiles is tiles_for(layout, 64, 32, CPU, serpentine=serpentine)


def test_a_selector_that_nothing_names_does_not_count() -> None:
    plan = plan_of(NEAR, TopK(share=0.5), proxies={}, assignment=[])
    assert tiles_of_plan(plan, Layout((5, 11, 13)), 64, CPU, block_q=64, block_k=32).boxes is not None


def test_a_searched_plan_keeps_the_tiles_it_was_scored_on() -> None:
    layout, model = Layout((5, 11, 13)), ModelFingerprint(model_class="Any", layers=1, heads=2, head_dim=16)
    for names, serpentine in ((("near4", "top4"), True), (("near4",), False)):
        found = make_candidates(layout, ["foveal"], names=names)
        near = next(one for one in found.kept if one.name == "near4")
        plan = build_plan(
            "no head chooses by content",
            {(0, 0, head): near for head in range(2)},
            family="foveal",
            model=model,
            grid=layout.grid,
            dense_steps=2,
            refresh=None,
            notes="",
            measured={},
            proxies=found.proxies,
        )
        assert not plan.selectors
        assert (tiles_of_plan(plan, layout, 64, CPU, block_q=64, block_k=32).boxes is None) == serpentine
        costs = make_costs(found.kept, layout, 64, "cpu")
        tiles = tiles_of_plan(plan, layout, 64, CPU)
        assert costs.block_density[found.kept.index(near)] == tiles.block_density(near.pattern)[0]


@pytest.mark.parametrize("tiles", ["boxes", "serpentine"])
def test_a_plan_may_say_how_large_its_tiles_are(tiles: str) -> None:
    plan = plan_of(NEAR, proxies={"tiles": tiles, "blocks": [96, 32]})
    made = tiles_of_plan(plan, LAYOUTS[1], 64, CPU)
    assert (made.block_q, made.block_k) == (96, 32)
    assert SparsePlan.from_dict(plan.to_dict()).proxies == plan.proxies
    override = tiles_of_plan(plan, LAYOUTS[1], 64, CPU, block_q=64)
    assert (override.block_q, override.block_k) == (64, 32)


@pytest.mark.parametrize("blocks", [96, [96], [0, 32], [80, 32], [96, 48], [1024, 32], [96, 32.0], [24, 32]])
def test_sizes_of_tiles_that_no_kernel_takes(blocks: object) -> None:
    with pytest.raises(
        ValueError, match=r"proxies: blocks: wanted \(queries, keys\) of a tile, .*suits short sequences"
    ):
        plan_of(NEAR, proxies={"blocks": blocks})
    with pytest.raises(ValueError, match=r"proxies: per_tile: wanted at most the 32 keys of a tile|per_tile: wanted"):
        plan_of(NEAR, proxies={"blocks": [64, 32], "per_tile": 64})


def test_a_search_may_say_how_large_tiles_are() -> None:
    layout = Layout((1, 20, 20))
    candidates = make_candidates(layout, ["pooled"], names=["pooled4", "near4"], blocks=(64, 32))
    assert candidates.proxies.blocks == (64, 32)
    small, usual = (make_costs(candidates.kept, layout, 64, "cpu", blocks=blocks) for blocks in ((64, 32), None))
    assert small.block_density != usual.block_density
    scorer = Scorer(candidates, count=None, every=4, seed=0, head_dim=64)
    assert scorer._of(layout, CPU).rows.tiles.block_k == 32
