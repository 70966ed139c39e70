import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order
from visparse.patterns import Neighborhood, SlidingTile


def seen(query: int, length: int, tile: int, window: int) -> list[int]:
    """The keys of one query on one axis: whole tiles, counted."""
    tiles = [list(range(first, min(first + tile, length))) for first in range(0, length, tile)]
    own = next(number for number, tokens in enumerate(tiles) if query in tokens)
    reach = window // 2
    many = 2 * reach + 1
    if many >= len(tiles):
        return list(range(length))
    first = own - reach
    while first < 0:
        first += 1
    while first + many > len(tiles):
        first -= 1
    return [key for tokens in tiles[first : first + many] for key in tokens]


def agrees(grid: Grid, tile: Grid, window: Grid) -> bool:
    tokens = list(product(*map(range, grid)))
    number = {token: index for index, token in enumerate(tokens)}
    expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q in tokens:
        for k in product(*(seen(q[axis], grid[axis], tile[axis], window[axis]) for axis in range(3))):
            expected[number[q], number[k]] = True
    at = Layout(grid).coordinates()
    return torch.equal(SlidingTile(tile=tile, window=window).keep(at, at, grid), expected)


def test_one_axis_exhaustively() -> None:
    checked = 0
    for length in range(1, 20):
        at = Layout((1, 1, length)).coordinates()
        for tile in range(1, length + 1):
            for window in range(1, -(-length // tile) + 1):
                kept = SlidingTile(tile=(1, 1, tile), window=(1, 1, window)).keep(at, at, (1, 1, length))
                expected = [[k in seen(q, length, tile, window) for k in range(length)] for q in range(length)]
                assert kept.tolist() == expected, (length, tile, window)
                checked += 1
    assert checked > 500


def test_three_axes_in_a_seeded_sweep() -> None:
    draw = random.Random(0)
    for _ in range(300):
        grid = (draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 5, 7]), draw.choice([1, 3, 5, 7]))
        tile = tuple(draw.randint(1, length) for length in grid)
        window = tuple(draw.randint(1, -(-length // side)) for length, side in zip(grid, tile, strict=True))
        assert agrees(grid, tile, window), (grid, tile, window)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    grid, tile, window = [], [], []
    for limit in (4, 6, 9):
        grid.append(draw(st.integers(1, limit)))
        tile.append(draw(st.integers(1, grid[-1])))
        window.append(draw(st.integers(1, -(-grid[-1] // tile[-1]))))
    return tuple(grid), tuple(tile), tuple(window)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_any_three_axes(case: tuple) -> None:
    assert agrees(*case)


def test_it_is_the_strided_neighborhood_where_tiles_fit() -> None:
    """GNA, section 3: STA is a neighbourhood whose stride is the tile and whose window is a multiple of it."""
    for grid, tile, window in [((6, 8, 12), (2, 2, 4), (1, 3, 3)), ((1, 12, 15), (1, 4, 3), (1, 3, 5))]:
        at = Layout(grid).coordinates()
        tokens = tuple(side * tiles for side, tiles in zip(tile, window, strict=True))
        neighborhood = Neighborhood(window=tokens, stride=tile)  # type: ignore[arg-type]
        assert torch.equal(SlidingTile(tile=tile, window=window).keep(at, at, grid), neighborhood.keep(at, at, grid))


def test_an_even_window_sees_one_tile_more() -> None:
    grid = (1, 1, 10)
    at = Layout(grid).coordinates()
    seen_keys = {
        window: SlidingTile(tile=(1, 1, 2), window=(1, 1, window)).keep(at, at, grid).sum(1).unique().tolist()
        for window in range(1, 6)
    }
    assert seen_keys == {1: [2], 2: [6], 3: [6], 4: [10], 5: [10]}


def test_published_hunyuan_video_is_made_of_whole_blocks() -> None:
    """30 x 48 x 80 tokens, 3 x 3 x 3 tiles of 6 x 8 x 8: 27 of 300 tiles, none of them masked."""
    lists = compile_lists(
        [SlidingTile()], Layout((30, 48, 80)), block_q=384, block_k=384, order=Order((6, 8, 8), (6, 8, 8))
    )
    assert len(lists.partial_indices) == 0
    assert lists.full_offsets.diff().unique().tolist() == [27]
    assert lists.block_density == pytest.approx(0.09)


def test_on_another_grid() -> None:
    published = SlidingTile()
    assert published.rescale((30, 48, 80), (18, 48, 80)) == SlidingTile(tile=(6, 8, 8), window=(1, 3, 3))
    assert published.rescale((30, 48, 80), (60, 96, 160)) == SlidingTile(tile=(6, 8, 8), window=(7, 7, 7))
    assert published.rescale((30, 48, 80), (1, 48, 80)) == SlidingTile(tile=(1, 8, 8), window=(1, 3, 3))
    assert published.rescale((30, 48, 80), (21, 45, 80)) == SlidingTile(tile=(6, 8, 8), window=(3, 3, 3))
    # A window that sees the whole axis still does, whether it is even or odd.
    assert SlidingTile(window=(5, 6, 1)).rescale((30, 48, 80), (18, 24, 40)).window == (3, 3, 1)
    assert SlidingTile(window=(4, 3, 1)).rescale((30, 48, 80), (60, 48, 80)).window == (10, 3, 1)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"tile": 0}, ValueError, "tile: wanted at least 1, got 0; count it in tokens"),
        ({"window": (3, -1, 3)}, ValueError, r"window: wanted at least 1, got \(3, -1, 3\); count it in tiles"),
        ({"tile": (8, 8)}, TypeError, r"tile: wanted a whole number or three of them .*, got \(8, 8\)"),
        ({"window": 2.5}, TypeError, "window: wanted a whole number or three of them"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SlidingTile(**fields)


@pytest.mark.parametrize(
    ("fields", "grid", "text"),
    [
        ({}, (1, 48, 80), r"tile: wanted at most 1 on the frames axis \(the length of the axis\), got 6 on the grid"),
        ({}, (30, 16, 80), r"window: wanted at most 2 on the height axis \(the tiles of the axis\), got 3 .* rescale"),
    ],
)
def test_a_window_larger_than_the_grid(fields: dict, grid: Grid, text: str) -> None:
    at = Layout(grid).coordinates()[:2]
    with pytest.raises(ValueError, match=text):
        SlidingTile(**fields).keep(at, at, grid)
    with pytest.raises(ValueError, match=text):
        SlidingTile(**fields).axes(grid)
    with pytest.raises(ValueError, match=text):
        SlidingTile(**fields).rescale(grid, grid)
