import random
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order
from visparse.patterns import Neighborhood


def seen(query: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """The keys of one query on one axis, from the words of the definition."""
    line = [key for key in range(length) if key % dilation == query % dilation]
    place = line.index(query)
    sharing = [other for other in range(len(line)) if other // stride == place // stride]
    if causal:
        leader = sharing[-1]
        return {line[other] for other in range(len(line)) if other <= place and leader - other < window}
    # The centre of the group; where the group is cut short, not beyond the last key.
    leader = min(sharing[0] + stride // 2, len(line) - 1)
    start = min(max(leader - window // 2, 0), len(line) - window)
    return set(line[start : start + window])


def whole(grid: Grid, window: Grid, stride: Grid, dilation: Grid, causal: tuple[bool, bool, bool]) -> list[list[bool]]:
    axes = [
        [seen(query, *numbers) for query in range(numbers[0])]
        for numbers in zip(grid, window, stride, dilation, causal, strict=True)
    ]
    tokens = list(product(*map(range, grid)))
    return [[all(k[i] in axes[i][q[i]] for i in range(3)) for k in tokens] for q in tokens]


def agrees(grid: Grid, window: Grid, stride: Grid, dilation: Grid, causal: tuple[bool, bool, bool]) -> bool:
    at = Layout(grid).coordinates()
    pattern = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    return pattern.keep(at, at, grid).tolist() == whole(grid, window, stride, dilation, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_one_axis_exhaustively(causal: bool) -> None:
    checked = 0
    for length in range(1, 14):
        at = Layout((1, 1, length)).coordinates()
        for window, dilation in product(range(1, length + 1), range(1, 5)):
            if window * dilation > length:
                continue
            for stride in range(1, window + 1):
                pattern = Neighborhood(
                    window=(1, 1, window),
                    stride=(1, 1, stride),
                    dilation=(1, 1, dilation),
                    causal=(False, False, causal),
                )
                expected = [
                    [k in seen(q, length, window, stride, dilation, causal) for k in range(length)]
                    for q in range(length)
                ]
                assert pattern.keep(at, at, (1, 1, length)).tolist() == expected, pattern
                checked += 1
    assert checked > 500


def test_three_axes_in_a_seeded_sweep() -> None:
    draw = random.Random(4)
    for _ in range(300):
        grid = (draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 5, 7]))
        dilation = tuple(draw.randint(1, min(3, length)) for length in grid)
        window = tuple(draw.randint(1, length // step) for length, step in zip(grid, dilation, strict=True))
        stride = tuple(draw.randint(1, keys) for keys in window)
        causal = tuple(draw.random() < 0.3 for _ in grid)
        assert agrees(grid, window, stride, dilation, causal), (grid, window, stride, dilation, causal)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    grid, window, stride, dilation, causal = [], [], [], [], []
    for limit in (4, 7, 7):
        grid.append(draw(st.integers(1, limit)))
        dilation.append(draw(st.integers(1, min(3, grid[-1]))))
        window.append(draw(st.integers(1, grid[-1] // dilation[-1])))
        stride.append(draw(st.integers(1, window[-1])))
        causal.append(draw(st.booleans()))
    return tuple(map(tuple, (grid, window, stride, dilation, causal)))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_three_axes(case: tuple) -> None:
    assert agrees(*case)


def test_examples_by_hand() -> None:
    def keys(length: int, query: int, **fields: object) -> list[int]:
        at = Layout((1, 1, length)).coordinates()
        kept = Neighborhood(**fields).keep(at[query : query + 1], at, (1, 1, length))  # type: ignore[arg-type]
        return kept[0].nonzero()[:, 0].tolist()

    assert keys(10, 0, window=3) == [0, 1, 2]  # shifted inward
    assert keys(10, 5, window=4) == [3, 4, 5, 6]  # an even window reaches further to the left
    assert keys(10, 9, window=4) == [6, 7, 8, 9]
    assert keys(10, 4, window=4, stride=2) == [3, 4, 5, 6]  # the leader of 4 and 5 is 5
    assert keys(10, 8, window=3, stride=3) == keys(10, 6, window=3, stride=3) == [6, 7, 8]
    assert keys(10, 9, window=3, stride=3) == [7, 8, 9]  # cut group: its leader is the last token
    assert keys(10, 5, window=3, dilation=3) == [2, 5, 8]
    assert keys(10, 5, window=3, causal=True) == [3, 4, 5]
    assert keys(10, 4, window=3, stride=2, causal=True) == [3, 4]  # leader 5, cut at the query


def test_one_number_stands_for_axes_longer_than_one() -> None:
    grid = (1, 6, 7)
    at = Layout(grid).coordinates()
    short = Neighborhood(window=3, stride=2, dilation=2, causal=True)
    long = Neighborhood(window=(1, 3, 3), stride=(1, 2, 2), dilation=(1, 2, 2), causal=(False, True, True))
    assert torch.equal(short.keep(at, at, grid), long.keep(at, at, grid))


def test_windows_hold_exactly_their_keys_and_the_query() -> None:
    grid = (5, 7, 11)
    at = Layout(grid).coordinates()
    kept = Neighborhood(window=(2, 3, 5), stride=(2, 1, 3), dilation=(1, 2, 2)).keep(at, at, grid)
    assert kept.sum(1).unique().tolist() == [30]
    assert kept.diagonal().all()


def test_queries_may_be_few() -> None:
    grid = (3, 4, 5)
    at = Layout(grid).coordinates()
    pattern = Neighborhood(window=3)
    assert torch.equal(pattern.keep(at[7:9], at[::3], grid), pattern.keep(at, at, grid)[7:9, ::3])


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"window": 0}, ValueError, "window: wanted at least 1, got 0; count it in tokens"),
        ({"window": -3}, ValueError, "window: wanted at least 1, got -3"),
        ({"window": (3, 3, -1)}, ValueError, r"window: wanted at least 1, got \(3, 3, -1\)"),
        ({"window": 3, "dilation": 0}, ValueError, "dilation: wanted at least 1, got 0"),
        ({"window": 3, "stride": -1}, ValueError, "stride: wanted at least 1, got -1"),
        ({"window": 3, "stride": 4}, ValueError, "got stride 4 and window 3 on frames; lower the stride to 3 or less"),
        ({"window": (9, 9, 2), "stride": 3}, ValueError, "got stride 3 and window 2 on width"),
        (
            {"window": 3.0},
            TypeError,
            r"window: wanted a whole number or three of them \(frames, height, width\), got 3.0",
        ),
        ({"window": (3, 3)}, TypeError, r"three of them \(frames, height, width\), got \(3, 3\)"),
        ({"window": True}, TypeError, "window: wanted a whole number"),
        ({"window": 3, "causal": 1}, TypeError, "causal: wanted a bool"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Neighborhood(**fields)


@pytest.mark.parametrize(
    ("fields", "grid", "text"),
    [
        ({"window": 9}, (5, 32, 32), r"window: 9 .* on the frames axis, but the grid \(5, 32, 32\) has 5; make"),
        ({"window": (1, 3, 3), "dilation": (1, 1, 3)}, (1, 8, 8), "3 with dilation 3 needs 9 tokens on the width axis"),
        ({"window": (3, 3, 3)}, (1, 8, 8), "make window \\* dilation at most 1 on that axis"),
    ],
)
def test_a_window_larger_than_the_grid(fields: dict, grid: Grid, text: str) -> None:
    at = Layout(grid).coordinates()
    with pytest.raises(ValueError, match=text):
        Neighborhood(**fields).keep(at, at, grid)
    with pytest.raises(ValueError, match=text):
        Neighborhood(**fields).factors(grid)


GNA_WINDOW, GNA_GRID = (18, 24, 24), (30, 48, 80)


@pytest.mark.parametrize(
    ("stride", "boxes", "most", "bound"), [(1, False, 275, 3.3), ((16, 8, 8), True, 81, 11.1), (1, True, 176, 5.1)]
)
def test_bounds_of_the_gna_paper(stride: int | Grid, boxes: bool, most: int, bound: float) -> None:
    """HunyuanVideo, query tiles 4 x 8 x 8 and key tiles 2 x 8 x 8: all key tiles over those of the busiest query tile.

    The paper has 3.3 at stride 1 and 11.1 at stride 16 x 8 x 8, which is all that the density allows. Key boxes that
    begin with the window bring stride 1 to 5.1.
    """
    pattern, order = Neighborhood(window=GNA_WINDOW, stride=stride), Order((4, 8, 8), (2, 8, 8))
    lists = compile_lists([pattern], Layout(GNA_GRID), block_q=256, block_k=128, order=order, boxes=boxes)
    visited = lists.full_offsets.diff() + lists.partial_offsets.diff()
    assert visited.max().item() == most
    assert prod(GNA_GRID) / 128 / most == pytest.approx(bound, abs=0.05)
    assert lists.density == pytest.approx(prod(GNA_WINDOW) / prod(GNA_GRID))
    assert (len(lists.partial_indices) == 0) == (stride != 1)


def test_the_packed_last_frames_of_the_gna_paper_see_more() -> None:
    """Of 30 frames two are left over by tiles of 4: without boxes two such pieces share a block, and see more."""
    pattern, order = Neighborhood(window=GNA_WINDOW, stride=(16, 8, 8)), Order((4, 8, 8), (2, 8, 8))
    lists = compile_lists([pattern], Layout(GNA_GRID), block_q=256, block_k=128, order=order)
    visited = lists.full_offsets.diff() + lists.partial_offsets.diff()
    numbers, blocks = visited.unique(return_counts=True)
    assert dict(zip(numbers.tolist(), blocks.tolist(), strict=True)) == {81: 432, 108: 18}


@pytest.mark.parametrize("window", [(1, 8, 16), (5, 16, 16), (9, 24, 32), (21, 24, 32), (4, 40, 80)])
def test_little_is_wasted_on_a_ragged_grid(window: Grid) -> None:
    """21 x 45 x 80, windows that are multiples of the tile: only the 3 rows that hang over the 45 are for nothing."""
    layout = Layout((21, 45, 80))
    lists = compile_lists(
        [Neighborhood(window=window, stride=(1, 8, 16))], layout, block_q=128, block_k=128, boxes=True
    )
    kept = lists.density * layout.visual**2
    visited = len(lists.full_indices) * 128 * 128
    assert len(lists.partial_indices) == 0
    assert kept / visited == pytest.approx(45 / 48)  # 6.2 % wasted


def lengths(pattern: Neighborhood) -> tuple:
    return pattern.window, pattern.stride, pattern.dilation


def test_on_another_grid() -> None:
    published = Neighborhood(window=GNA_WINDOW, stride=(16, 8, 8))
    assert lengths(published.rescale(GNA_GRID, (60, 96, 160))) == ((36, 48, 48), (32, 16, 16), (1, 1, 1))
    # 12.6, 22.5 and 24; 11.2, 7.5 and 8: half up.
    assert lengths(published.rescale(GNA_GRID, (21, 45, 80))) == ((13, 23, 24), (11, 8, 8), (1, 1, 1))
    assert lengths(published.rescale(GNA_GRID, (1, 1, 2))) == ((1, 1, 1), (1, 1, 1), (1, 1, 1))
    # One number is counted on the axes that are longer than 1; all of one frame stays all frames.
    assert Neighborhood(window=8).rescale((1, 32, 32), (4, 48, 32)).window == (4, 12, 8)
    dilated = Neighborhood(window=(1, 3, 4), stride=(1, 3, 2), dilation=(1, 4, 2), causal=(False, False, True))
    short = dilated.rescale((1, 16, 16), (1, 6, 3))
    assert lengths(short) == ((1, 1, 1), (1, 1, 1), (1, 4, 2))
    assert short.causal == (False, False, True)
    assert lengths(dilated.rescale((1, 16, 16), (1, 3, 32))) == ((1, 1, 8), (1, 1, 4), (1, 3, 2))


@settings(max_examples=100, deadline=None)
@given(cases(), st.tuples(*[st.integers(1, 12)] * 3))
def test_a_rescaled_window_fits_any_grid(case: tuple, target: Grid) -> None:
    grid, window, stride, dilation, causal = case
    pattern = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal).rescale(grid, target)
    at = Layout(target).coordinates()[:1]
    assert pattern.keep(at, at, target).item()
