import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Neighborhood, ShiftedWindow, Window


def own_window(query: int, length: int, window: int) -> list[int]:
    """The keys of one query on one axis: the axis is cut into pieces."""
    pieces = [list(range(length))[first : first + window] for first in range(0, length, window)]
    return next(piece for piece in pieces if query in piece)


def swin(query: int, length: int, window: int, shift: int) -> list[int]:
    """The keys of one query on one axis as Swin finds them: pad the end, roll, cut into windows, mask by region."""
    if window == length:
        shift = 0
    line = list(range(length)) + [-1] * (-length % window)
    line = line[shift:] + line[:shift]
    region = [0] * len(line)
    for place in range(len(line)):
        if place >= len(line) - window:
            region[place] = 1
        if shift and place >= len(line) - shift:
            region[place] = 2
    place = line.index(query)
    first = place // window * window
    return sorted(line[at] for at in range(first, first + window) if region[at] == region[place] and line[at] >= 0)


def agrees(grid: Grid, window: Grid, shift: Grid | None) -> bool:
    """``shift`` None means plain windows."""
    tokens = list(product(*map(range, grid)))
    number = {token: index for index, token in enumerate(tokens)}
    expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q in tokens:
        by_axis = [
            own_window(q[axis], grid[axis], window[axis])
            if shift is None
            else swin(q[axis], grid[axis], window[axis], shift[axis])
            for axis in range(3)
        ]
        for k in product(*by_axis):
            expected[number[q], number[k]] = True
    pattern = Window(window=window) if shift is None else ShiftedWindow(window=window, shift=shift)
    at = Layout(grid).coordinates()
    return torch.equal(pattern.keep(at, at, grid), expected)


def test_one_axis_exhaustively() -> None:
    checked = 0
    for length in range(1, 15):
        grid = (1, 1, length)
        at = Layout(grid).coordinates()
        for window in range(1, length + 1):
            plain = Window(window=(1, 1, window)).keep(at, at, grid).tolist()
            assert plain == [[k in own_window(q, length, window) for k in range(length)] for q in range(length)]
            for shift in range(window):
                kept = ShiftedWindow(window=(1, 1, window), shift=(0, 0, shift)).keep(at, at, grid).tolist()
                assert kept == [[k in swin(q, length, window, shift) for k in range(length)] for q in range(length)]
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("shifted", [False, True])
def test_three_axes_in_a_seeded_sweep(shifted: bool) -> None:
    draw = random.Random(1)
    for _ in range(300):
        grid = (draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 5, 7]), draw.choice([1, 3, 5, 7]))
        window = tuple(draw.randint(1, length) for length in grid)
        shift = tuple(draw.randrange(side) for side in window) if shifted else None
        assert agrees(grid, window, shift), (grid, window, shift)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    grid, window, shift = [], [], []
    for limit in (4, 6, 9):
        grid.append(draw(st.integers(1, limit)))
        window.append(draw(st.integers(1, grid[-1])))
        shift.append(draw(st.integers(0, window[-1] - 1)))
    return tuple(grid), tuple(window), draw(st.sampled_from([None, tuple(shift)]))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_any_three_axes(case: tuple) -> None:
    assert agrees(*case)


def test_swin_on_its_own_picture() -> None:
    """56 x 56 tokens, windows of 7, shifted by 3: windows of 49; cut ones at the borders."""
    grid = (1, 56, 56)
    at = Layout(grid).coordinates()
    assert Window(window=7).keep(at[::50], at, grid).sum(1).unique().tolist() == [49]
    shifted = ShiftedWindow(window=7)
    assert torch.equal(shifted.keep(at, at[::9], grid), ShiftedWindow(window=7, shift=3).keep(at, at[::9], grid))
    sizes = {3 * 3, 3 * 7, 3 * 4, 4 * 4, 4 * 7, 7 * 7}
    assert set(shifted.keep(at, at, grid).sum(1).unique().tolist()) == sizes


def test_an_axis_that_is_one_window_is_not_shifted() -> None:
    grid = (8, 14, 14)
    at = Layout(grid).coordinates()[::7]
    video = ShiftedWindow(window=(8, 7, 7))
    assert torch.equal(video.keep(at, at, grid), ShiftedWindow(window=(8, 7, 7), shift=(0, 3, 3)).keep(at, at, grid))


def test_windows_are_strided_neighborhoods_where_they_fit() -> None:
    grid = (2, 6, 9)
    at = Layout(grid).coordinates()
    blocked = Neighborhood(window=(1, 3, 3), stride=(1, 3, 3))
    assert torch.equal(Window(window=(1, 3, 3)).keep(at, at, grid), blocked.keep(at, at, grid))


def test_on_another_grid() -> None:
    # PT-DiT: 32 x 32 tokens in windows of 4, 128 x 128 in windows of 16.
    assert Window(window=(1, 4, 4)).rescale((1, 32, 32), (1, 128, 128)) == Window(window=(1, 16, 16))
    assert Window(window=7).rescale((1, 56, 56), (1, 20, 4)) == Window(window=(1, 3, 1))  # 2.5 and 0.5, half up
    assert Window(window=7).rescale((1, 56, 56), (9, 56, 56)) == Window(window=(9, 7, 7))  # all frames stay all
    half = ShiftedWindow(window=(2, 8, 8))
    assert half.rescale((8, 32, 32), (16, 48, 16)) == ShiftedWindow(window=(4, 12, 4))
    given = ShiftedWindow(window=(2, 8, 8), shift=(0, 7, 3))
    assert given.rescale((8, 32, 32), (16, 48, 4)) == ShiftedWindow(window=(4, 12, 1), shift=(0, 11, 0))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Window(window=0), ValueError, "window: wanted at least 1, got 0; count it in tokens"),
        (lambda: Window(window="7"), TypeError, "window: wanted a whole number or three of them .*, got '7'"),  # type: ignore[arg-type]
        (lambda: ShiftedWindow(window=(1, 0, 7)), ValueError, r"window: wanted at least 1, got \(1, 0, 7\)"),
        (lambda: ShiftedWindow(window=7, shift=-1), ValueError, "shift: wanted at least 0, got -1; count it in tokens"),
        (lambda: ShiftedWindow(window=7, shift=1.5), TypeError, "shift: wanted a whole number"),  # type: ignore[arg-type]
        (
            lambda: ShiftedWindow(window=(1, 7, 7), shift=(0, 3, 7)),
            ValueError,
            "shift: wanted less than the window .*, got shift 7 and window 7 on width; lower the shift to 6 or less",
        ),
    ],
)
def test_bad_values(build, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize("pattern", [Window(window=(2, 9, 3)), ShiftedWindow(window=(2, 9, 3))])
def test_a_window_larger_than_the_grid(pattern: Window | ShiftedWindow) -> None:
    text = r"window: wanted at most 8 on the height axis \(the length of the axis\), got 9 on the grid \(2, 8, 8\)"
    at = Layout((2, 8, 8)).coordinates()
    for ask in (lambda: pattern.keep(at, at, (2, 8, 8)), lambda: pattern.axes((2, 8, 8))):
        with pytest.raises(ValueError, match=text):
            ask()
