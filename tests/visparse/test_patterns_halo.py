import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Halo, Neighborhood


def seen(query: int, length: int, block: int, halo: int) -> list[int]:
    """The keys of one query on one axis: a padded axis is unfolded as HaloNet does, then the padding is left out."""
    blocks = -(-length // block)
    missing = blocks * block - length
    padded = [-1] * halo + list(range(length)) + [-1] * (missing + halo)
    windows = [padded[first * block : first * block + block + 2 * halo] for first in range(blocks)]
    own = next(
        number for number in range(blocks) if query in padded[halo + number * block : halo + (number + 1) * block]
    )
    return [key for key in windows[own] if key >= 0]


def agrees(grid: Grid, block: Grid, halo: Grid) -> bool:
    tokens = list(product(*map(range, grid)))
    number = {token: index for index, token in enumerate(tokens)}
    expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q in tokens:
        for k in product(*(seen(q[axis], grid[axis], block[axis], halo[axis]) for axis in range(3))):
            expected[number[q], number[k]] = True
    at = Layout(grid).coordinates()
    return torch.equal(Halo(block=block, halo=halo).keep(at, at, grid), expected)


def test_one_axis_exhaustively() -> None:
    checked = 0
    for length in range(1, 14):
        at = Layout((1, 1, length)).coordinates()
        for block, halo in product(range(1, length + 1), range(length)):
            kept = Halo(block=(1, 1, block), halo=(0, 0, halo)).keep(at, at, (1, 1, length))
            expected = [[k in seen(q, length, block, halo) for k in range(length)] for q in range(length)]
            assert kept.tolist() == expected, (length, block, halo)
            checked += 1
    assert checked > 500


def test_three_axes_in_a_seeded_sweep() -> None:
    draw = random.Random(2)
    for _ in range(300):
        grid = (draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 5, 7]), draw.choice([1, 3, 5, 7]))
        block = tuple(draw.randint(1, length) for length in grid)
        halo = tuple(draw.randrange(length) for length in grid)
        assert agrees(grid, block, halo), (grid, block, halo)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    grid, block, halo = [], [], []
    for limit in (4, 6, 9):
        grid.append(draw(st.integers(1, limit)))
        block.append(draw(st.integers(1, grid[-1])))
        halo.append(draw(st.integers(0, grid[-1] - 1)))
    return tuple(grid), tuple(block), tuple(halo)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_any_three_axes(case: tuple) -> None:
    assert agrees(*case)


def test_it_is_a_strided_neighborhood_inside_and_sees_less_at_the_borders() -> None:
    grid = (1, 1, 32)
    at = Layout(grid).coordinates()
    halo = Halo(block=4, halo=2).keep(at, at, grid)
    moved = Neighborhood(window=8, stride=4).keep(at, at, grid)
    assert torch.equal(halo[4:28], moved[4:28])
    assert halo.sum(1).tolist() == [6] * 4 + [8] * 24 + [6] * 4
    assert moved.sum(1).unique().tolist() == [8]


def test_on_another_grid() -> None:
    assert Halo().rescale((1, 32, 32), (1, 64, 48)) == Halo(block=(1, 16, 12), halo=(0, 6, 5))
    assert Halo(block=(1, 8, 8), halo=(0, 3, 3)).rescale((4, 32, 32), (2, 2, 1)) == Halo(
        block=(1, 1, 1), halo=(0, 1, 0)
    )


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"block": 0}, ValueError, "block: wanted at least 1, got 0; count it in tokens"),
        ({"halo": -1}, ValueError, "halo: wanted at least 0, got -1; count it in tokens"),
        ({"block": (8, 8)}, TypeError, "block: wanted a whole number or three of them"),
        ({"halo": 0.5}, TypeError, "halo: wanted a whole number or three of them"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Halo(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, r"block: wanted at most 6 on the height axis \(the length of the axis\), got 8 on the grid \(1, 6, 9\)"),
        ({"block": 2, "halo": 6}, r"halo: wanted at most 5 on the height axis \(all other tokens of the axis\), got 6"),
        ({"block": 2, "halo": (1, 1, 1)}, "halo: wanted at most 0 on the frames axis .*, got 1"),
    ],
)
def test_a_window_larger_than_the_grid(fields: dict, text: str) -> None:
    at = Layout((1, 6, 9)).coordinates()
    with pytest.raises(ValueError, match=text):
        Halo(**fields).keep(at, at, (1, 6, 9))
    with pytest.raises(ValueError, match=text):
        Halo(**fields).axes((1, 6, 9))
