from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.boxes import box_shapes, check_shape, inward_tiles, runs_of, tiles_of
from visparse.boxes_axis import cut_spans, masks_of, spans_of
from visparse.layout import Grid

CPU = torch.device("cpu")
grids = st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 90))


@settings(max_examples=100, deadline=None)
@given(grids, st.sampled_from([16, 32, 48, 64, 96, 128, 192, 80]), st.booleans())
def test_every_shape_can_be_fetched(grid: Grid, block: int, queries: bool) -> None:
    for box in box_shapes(grid, block, queries=queries):
        assert prod(box) == block
        assert max(box) <= 256
        for axis, (side, length) in enumerate(zip(box, grid, strict=True)):
            slowest = axis == 0 or max(box[:axis]) == 1
            allowed = [2**power for power in range(9)]
            if queries and slowest:
                allowed += [3 * side for side in allowed]
            assert side in allowed
            assert side < 2 * length if queries else side <= length
        if (
            queries and block % 64 == 0
        ):  # the kernel cuts the slowest axis that is longer than 1 into parts of 64 tokens
            assert next(side for side in box if side > 1) % (block // 64) == 0


def test_shapes_of_the_hopper_kernel_are_found() -> None:
    grid = (33, 45, 80)
    assert {(2, 8, 8), (4, 4, 8), (1, 8, 16), (1, 2, 64)} <= set(box_shapes(grid, 128, queries=True))
    assert {(3, 8, 8), (3, 4, 16), (1, 24, 8), (6, 4, 8)} <= set(box_shapes(grid, 192, queries=True))
    assert (8, 24, 1) not in box_shapes(grid, 192, queries=True)
    assert box_shapes(grid, 192, queries=False) == []
    assert box_shapes((1, 4, 8), 128, queries=False) == []


@pytest.mark.parametrize(
    ("name", "box", "text"),
    [
        ("q", (2, 8, 4), r"wanted a q tile of block_q = 128 tokens, got \(2, 8, 4\), which has 64"),
        ("q", (1, 16, 8), None),
        ("k", (16, 2, 4), r"wanted a k tile inside the grid \(4, 20, 20\), got \(16, 2, 4\)"),
    ],
)
def test_check_shape(name: str, box: Grid, text: str | None) -> None:
    if text is None:
        check_shape(name, box, 128, (4, 20, 20))
        return
    with pytest.raises(ValueError, match=text):
        check_shape(name, box, 128, (4, 20, 20))


def test_a_factor_3_is_only_for_the_slowest_axis_of_queries() -> None:
    check_shape("q", (6, 4, 8), 192, (9, 9, 9))
    with pytest.raises(
        ValueError, match=r"the slowest axis of a query tile .* may have one factor 3\), got \(2, 12, 8\)"
    ):
        check_shape("q", (2, 12, 8), 192, (9, 20, 9))
    with pytest.raises(ValueError, match=r"sides are powers of two up to 256 .* got \(3, 8, 8\)"):
        check_shape("k", (3, 8, 8), 192, (9, 9, 9))


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 11)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8)),
    st.integers(0, 7),
)
def test_tiles_hold_every_token_once(grid: Grid, box: Grid, first: int) -> None:
    wanted = list(range(first, first + prod(grid)))
    tiles = tiles_of(grid, first, box, CPU).tokens
    assert sorted(tiles[tiles >= 0].tolist()) == wanted
    box = tuple(min(side, length) for side, length in zip(box, grid, strict=True))  # type: ignore[assignment]
    side, owned = inward_tiles(grid, first, box, CPU)
    assert sorted(owned[owned >= 0].tolist()) == wanted
    assert bool((side.tokens >= 0).all())
    assert torch.equal(owned[owned >= 0], side.tokens[owned >= 0])


def test_runs_are_padded_at_their_end() -> None:
    runs = runs_of(3, 9, 4, CPU)
    assert runs.tokens.tolist() == [[3, 4, 5, 6], [7, 8, -1, -1]]
    assert runs.starts.tolist() == [[-1, 0, 3], [-1, 0, 7]]
    assert len(runs_of(5, 5, 4, CPU).tokens) == 0


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 24), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_an_axis_is_cut_so_that_every_kept_pair_is_kept_once(
    data: st.DataObject, length: int, q_side: int, k_side: int
) -> None:
    k_side = min(k_side, length)
    low = data.draw(st.lists(st.integers(0, length), min_size=length, max_size=length))
    size = data.draw(st.lists(st.integers(0, length), min_size=length, max_size=length))
    holes = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    at = torch.arange(length)
    begin, end = torch.tensor(low)[:, None], torch.tensor(low)[:, None] + torch.tensor(size)[:, None]
    table = (at >= begin) & (at < end) & torch.tensor(holes)
    cut = cut_spans(spans_of(table, q_side), k_side)
    masks = masks_of(table, cut, q_side, k_side)
    times = torch.zeros(length, length, dtype=torch.int64)
    for tile, sides in enumerate(masks):
        queries = torch.arange(tile * q_side, min((tile + 1) * q_side, length))
        for side, mask in enumerate(sides):
            mask = mask[: len(queries)]
            assert bool(cut.full[tile, side]) == bool(mask.all())
            if not cut.seen[tile, side]:
                assert not mask.any()
                continue
            assert mask.any()
            start = int(cut.starts[tile, side])
            assert 0 <= start <= length - k_side
            times[queries, start : start + k_side] += mask.long()
    assert torch.equal(times, table.long())
