"""Union, Intersection and PerHead against plain loops over tokens."""

import json
import random
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import visual_blocks
from visparse.patterns import (
    Dense,
    Intersection,
    Neighborhood,
    Pattern,
    PerHead,
    Radial,
    Skip,
    Union,
    pattern_from_dict,
)
from visparse.patterns.combined_masks import number_masks

GRIDS = [(1, 1, 1), (1, 1, 31), (1, 5, 7), (2, 3, 5), (3, 5, 5), (5, 3, 2), (2, 7, 3), (4, 4, 4), (7, 1, 5)]

Token = tuple[int, int, int]


def window_keeps(q: Token, k: Token, grid: Grid, window: Grid) -> bool:
    """A window of so many keys on every axis; at a border it is pushed back into the grid."""
    for place, key, length, size in zip(q, k, grid, window, strict=True):
        first = place - size // 2
        while first < 0:
            first += 1
        while first + size > length:
            first -= 1
        if key not in range(first, first + size):
            return False
    return True


def band_keeps(q: Token, k: Token, grid: Grid, sink: bool) -> bool:
    """Equation 4 of Radial Attention."""
    if sink and k[0] == 0:
        return True
    tokens, distance = grid[1] * grid[2], abs(q[0] - k[0])
    thinning = 1
    while 2 * thinning <= distance:
        thinning *= 2
    apart = abs((q[1] - k[1]) * grid[2] + q[2] - k[2])
    if thinning <= tokens and (apart + 1) * thinning <= tokens:
        return True
    period = 1
    while period * tokens < thinning:
        period += 1
    return apart == 0 and distance % period == 0


def keeps(pattern: Pattern, q: Token, k: Token, grid: Grid) -> bool:
    if isinstance(pattern, Union):
        found = False
        for part in pattern.patterns:
            found = found or keeps(part, q, k, grid)
        return found
    if isinstance(pattern, Intersection):
        return not [part for part in pattern.patterns if not keeps(part, q, k, grid)]
    if isinstance(pattern, Neighborhood):
        assert isinstance(pattern.window, tuple)
        return window_keeps(q, k, grid, pattern.window)
    if isinstance(pattern, Radial):
        return band_keeps(q, k, grid, pattern.sink)
    return isinstance(pattern, Dense)


def some_pattern(dice: random.Random, grid: Grid, depth: int) -> Pattern:
    if depth:
        parts = tuple(some_pattern(dice, grid, dice.randrange(depth)) for _ in range(dice.randint(1, 3)))
        return dice.choice((Union, Intersection))(patterns=parts)
    kind = dice.randrange(10)
    if kind < 6:
        frames, height, width = (dice.randint(1, length) for length in grid)
        return Neighborhood(window=(frames, height, width))
    return (Radial(), Radial(sink=False), Dense(), Skip())[kind - 6]


def check(pattern: Pattern, grid: Grid) -> None:
    tokens = list(product(*map(range, grid)))
    wanted = torch.tensor([[keeps(pattern, q, k, grid) for k in tokens] for q in tokens])
    at = Layout(grid).coordinates()
    assert torch.equal(pattern.keep(at, at, grid), wanted), pattern
    for boxes in (False, True):
        lists = compile_lists([pattern], Layout(grid), block_q=16, block_k=32, boxes=boxes)
        assert torch.equal(lists.to_mask()[0], wanted), (pattern, boxes)
        assert round(lists.density * prod(grid) ** 2) == int(wanted.sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
def test_combinations_are_what_their_parts_say(grid: Grid, depth: int) -> None:
    dice = random.Random(str((grid, depth)))
    for _ in range(20):
        check(some_pattern(dice, grid, depth), grid)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)), st.integers(1, 3), st.randoms())
def test_odd_combinations(grid: Grid, depth: int, dice: random.Random) -> None:
    check(some_pattern(dice, grid, depth), grid)


@pytest.mark.parametrize("tile", [None, (2, 4, 4), (1, 4, 8)])
def test_equal_numbers_are_equal_masks(tile: Grid | None) -> None:
    grid = (5, 7, 9)
    at = Layout(grid).coordinates()
    q, k = visual_blocks(Layout(grid), tile, 16), visual_blocks(Layout(grid), tile, 32)
    rows, cols = torch.ones(len(q), len(k)).nonzero(as_tuple=True)
    window, band = Neighborhood(window=(3, 3, 5)), Radial()
    for pattern in (
        window,
        Dense(),
        Radial(variant="code", block=32, decay=0.3),
        Union(patterns=(window, band)),
        Intersection(patterns=(window, band)),
        Union(patterns=(window, Dense(), Skip())),
    ):
        kept = pattern.keep(at, at, grid)
        numbers = pattern.alike(q, k, rows, cols, grid)
        if numbers is None:
            numbers = number_masks(pattern.factors(grid) or (), q, k, rows, cols)
        masks: dict[int, torch.Tensor] = {}
        for number, row, col in zip(numbers.tolist(), rows.tolist(), cols.tolist(), strict=True):
            mask = kept[q[row]][:, k[col]] & (q[row] >= 0)[:, None] & (k[col] >= 0)
            assert torch.equal(masks.setdefault(number, mask), mask), pattern
        assert len(masks) < len(rows)


def test_few_masks_of_a_union_are_evaluated() -> None:
    grid = (8, 24, 32)
    blocks = visual_blocks(Layout(grid), (4, 4, 8), 128)
    rows, cols = torch.ones(len(blocks), len(blocks)).nonzero(as_tuple=True)
    union = Union(patterns=(Neighborhood(window=(8, 5, 5)), Neighborhood(window=(3, 24, 3))))
    numbers = union.alike(blocks, blocks, rows, cols, grid)
    assert numbers is not None
    assert len(numbers.unique()) < len(numbers) / 10


class TestStructure:
    grid = (3, 8, 8)
    near, wide = Neighborhood(window=(1, 3, 3)), Neighborhood(window=(3, 3, 3))

    def test_axes(self) -> None:
        """An intersection of products is one; a union only where one axis differs."""
        tall = Neighborhood(window=(1, 8, 1))
        assert Union(patterns=(self.near, self.wide)).axes(self.grid) is not None
        assert Union(patterns=(self.near, tall)).axes(self.grid) is None
        assert Intersection(patterns=(self.wide, tall)).axes(self.grid) is not None
        assert Intersection(patterns=(self.near, Radial())).axes(self.grid) is None

    def test_factors(self) -> None:
        code = Radial(variant="code", block=16)
        factors = Intersection(patterns=(self.near, code)).factors(self.grid)
        assert factors is not None
        assert len(factors) == 4
        assert Intersection(patterns=(self.near, Radial())).factors(self.grid) is None
        assert Union(patterns=(self.near, code)).factors(self.grid) is None

    def test_a_part_that_is_dense_or_skipped(self) -> None:
        at = Layout(self.grid).coordinates()
        near = self.near.keep(at, at, self.grid)
        assert Union(patterns=(self.near, Dense())).keep(at, at, self.grid).all()
        assert torch.equal(Union(patterns=(self.near, Skip())).keep(at, at, self.grid), near)
        assert torch.equal(Intersection(patterns=(self.near, Dense())).keep(at, at, self.grid), near)
        assert not Intersection(patterns=(self.near, Skip())).keep(at, at, self.grid).any()

    def test_extra_tokens_stay_visible_beside_skip(self) -> None:
        layout = Layout((1, 4, 4), before=3)
        both = Intersection(patterns=(self.near, Skip()))
        mask = compile_lists([both], layout, block_q=16, block_k=32).to_mask()[0]
        assert mask[:, :3].all()
        assert mask[:3].all()
        assert not mask[3:, 3:].any()


NESTED = Union(patterns=(Neighborhood(window=(1, 3, 3)), Intersection(patterns=(Radial(), Dense(), Skip()))))


def test_json_round_trip() -> None:
    data = json.loads(json.dumps(NESTED.to_dict()))
    assert data["patterns"][1] == {
        "name": "intersection",
        "patterns": [Radial().to_dict(), {"name": "dense"}, {"name": "skip"}],
    }
    back = pattern_from_dict(data)
    assert back == NESTED
    assert hash(back) == hash(NESTED)
    assert Union.from_dict(NESTED.to_dict()) == NESTED
    assert Union.from_dict({"patterns": [Dense(), {"name": "skip"}]}) == Union(patterns=(Dense(), Skip()))
    mix = PerHead(patterns=(NESTED, Dense()), cycle=True)
    assert PerHead.from_dict(json.loads(json.dumps(mix.to_dict()))) == mix
    assert hash(PerHead.from_dict(mix.to_dict())) == hash(mix)
    assert Union(patterns=[Dense()]) == Union(patterns=(Dense(),))  # type: ignore[arg-type]


def test_rescale_asks_the_parts() -> None:
    source, target = (3, 6, 8), (3, 12, 4)
    window = Neighborhood(window=(3, 3, 4), stride=(1, 1, 2))
    moved = window.rescale(source, target)
    assert moved != window
    both = Intersection(patterns=(window, Union(patterns=(Radial(), window))))
    assert both.rescale(source, target) == Intersection(patterns=(moved, Union(patterns=(Radial(), moved))))
    assert PerHead(patterns=(window, Radial()), cycle=True).rescale(source, target) == PerHead(
        patterns=(moved, Radial()), cycle=True
    )


def test_heads() -> None:
    mix = (Radial(), Dense(), Skip())
    assert PerHead(patterns=mix).heads(3) == mix
    assert PerHead(patterns=mix, cycle=True).heads(7) == (*mix, *mix, Radial())
    lists = compile_lists(PerHead(patterns=mix, cycle=True).heads(4), Layout((2, 3, 4)), block_q=16, block_k=32)
    assert lists.head_group.tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("kind", [Union, Intersection, PerHead])
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ((), ValueError, r"patterns: wanted at least one pattern, got none; give for example patterns=\(Neigh"),
        (Dense(), TypeError, r"patterns: wanted a tuple of patterns, got Dense Dense\(\); give for example"),
        ((Dense(), 3), TypeError, "patterns: wanted patterns, got int 3 at place 1; give for example"),
        ((Dense(), Dense), TypeError, "patterns: wanted patterns, got ABCMeta .* at place 1"),
    ],
)
def test_bad_parts(kind: type, value: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kind(patterns=value)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"name": "union"}, ValueError, "pattern 'union' lacks the key 'patterns'; give it a value"),
        ({"name": "unoin", "patterns": []}, ValueError, "unknown pattern 'unoin'; .*did you mean 'union'"),
        ({"name": "union", "patterns": []}, ValueError, "patterns: wanted at least one pattern, got none"),
        ({"name": "union", "patterns": 3}, TypeError, "patterns: wanted a tuple of patterns, got int 3"),
        ({"name": "union", "patterns": [{"name": "dense"}, 3]}, TypeError, "got int 3 at place 1"),
        (
            {"name": "union", "patterns": [{"name": "dense"}, {"name": "neighborhood", "windw": 3}]},
            ValueError,
            "patterns, place 1: pattern 'neighborhood' has an unknown key 'windw'; did you mean 'window'",
        ),
        (
            {"name": "union", "patterns": [{"name": "intersection", "patterns": [{"name": "radial", "sink": 1}]}]},
            TypeError,
            "patterns, place 0: patterns, place 0: sink: wanted bool, got int 1",
        ),
        ({"name": "union", "patterns": [{"name": "per_head", "patterns": []}]}, ValueError, "unknown pattern"),
        ({"name": "union", "pattern": []}, ValueError, "unknown key 'pattern'; did you mean 'patterns'"),
    ],
)
def test_bad_json(data: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pattern_from_dict(data)


def test_bad_lists_per_head() -> None:
    for data, text in (
        ({"name": "per_head"}, "'per_head' lacks the key 'patterns'; give it a list with one pattern per head"),
        ({"name": "union", "patterns": []}, "name: wanted 'per_head', got 'union'; read it with pattern_from_dict"),
    ):
        with pytest.raises(ValueError, match=text):
            PerHead.from_dict(data)
    with pytest.raises(TypeError, match="cycle: wanted a bool, got int 1"):
        PerHead(patterns=(Dense(),), cycle=1)  # type: ignore[arg-type]
    for cycle, heads, text in (
        (False, 4, r"got 3 patterns for 4 heads; give as many as heads, or cycle=True to repeat them"),
        (False, 2, "got 3 patterns for 2 heads; leave some out"),
        (True, 2, "got 3 patterns for 2 heads; leave some out"),
    ):
        with pytest.raises(ValueError, match=text):
            PerHead(patterns=(Dense(),) * 3, cycle=cycle).heads(heads)


def test_a_part_that_does_not_fit_the_grid() -> None:
    for kind in (Union, Intersection):
        pattern = kind(patterns=(Dense(), Neighborhood(window=9)))
        with pytest.raises(ValueError, match="window: 9 with dilation 1 needs 9 tokens on the height axis"):
            compile_lists([pattern], Layout((9, 8, 9)), block_q=16, block_k=32)
        with pytest.raises(ValueError, match="window: 9 with dilation 1"):
            pattern.mask_mod(Layout((9, 8, 9)))
