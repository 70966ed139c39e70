from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
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
