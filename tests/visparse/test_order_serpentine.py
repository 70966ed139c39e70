"""The serpentine curve: every run of it is compact, as those of no other order are, and so are parts of a run."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visparse.layout import Grid, coordinates
from visparse.order_curves import CURVES, curve_order
from visparse.order_serpentine import halve_tiles, serpentine_order

GRIDS: list[Grid] = [(21, 45, 80), (13, 30, 45), (1, 74, 74)]
BLOCKS = (64, 128, 192)
grids = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 13))


def cut(order: Tensor, block: int) -> Tensor:
    """Runs of an order, [tiles, block]; padding is -1."""
    return torch.cat([order, order.new_full((-len(order) % block,), -1)]).view(-1, block)


def spread(tiles: Tensor, grid: Grid) -> Tensor:
    """Mean squared distance of the tokens of each tile from their centre, [tiles]."""
    real = (tiles >= 0)[..., None]
    at, count = coordinates(tiles.clamp(min=0), grid).double() * real, real.sum(1)
    offset = (at - (at.sum(1) / count)[:, None]) * real
    return offset.square().sum((1, 2)) / count[:, 0]


def ideal(grid: Grid, block: int) -> float:
    """The same of a cube with as many tokens as a tile, or of a square, or of a line."""
    axes = sum(length > 1 for length in grid)
    return axes * (block ** (2 / axes) - 1) / 12


def is_compact(order: Tensor, grid: Grid, block: int) -> bool:
    """Whether runs are nearly cubes on average, and the worst one is not far from it."""
    found = spread(cut(order, block), grid)
    return bool(found.mean() < 1.15 * ideal(grid, block) and found.max() < 2.4 * ideal(grid, block))


def walk(grid: Grid, block: int, *, turn_columns: bool, turn_rows: bool) -> Tensor:
    """Strips of a grid, walked in a loop as the curve does, or without turning back at their ends."""
    side = round(block ** (1 / sum(length > 1 for length in grid)))
    frames, rows, columns = (range(length) for length in grid)
    found: list[int] = []
    strips = 0
    for number, first in enumerate(frames[::side]):
        bands = list(rows[::side])
        for top in bands[::-1] if turn_rows and number % 2 else bands:
            for column in columns[::-1] if turn_columns and strips % 2 else columns:
                found += [
                    (frame * grid[1] + row) * grid[2] + column
                    for frame in frames[first : first + side]
                    for row in rows[top : top + side]
                ]
            strips += 1
    return torch.tensor(found)


@settings(max_examples=200, deadline=None)
@given(grids, st.integers(1, 200))
def test_every_token_has_one_place(grid: Grid, block: int) -> None:
    assert sorted(serpentine_order(grid, block).tolist()) == list(range(prod(grid)))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_runs_are_compact_where_those_of_other_orders_are_not(grid: Grid, block: int) -> None:
    assert is_compact(serpentine_order(grid, block), grid, block)
    assert not is_compact(torch.arange(prod(grid)), grid, block)
    for curve in CURVES:
        assert not is_compact(curve_order(curve, grid), grid, block), curve


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_curve_that_jumps_would_be_found_out(grid: Grid, block: int) -> None:
    assert not is_compact(walk(grid, block, turn_columns=False, turn_rows=True), grid, block)
    back = walk(grid, block, turn_columns=True, turn_rows=False)
    assert has_no_jump(back, grid, block) == (grid[0] == 1)  # a picture has one band of frames: there is no way back
    assert not has_no_jump(walk(grid, block, turn_columns=False, turn_rows=True), grid, block)
    assert has_no_jump(walk(grid, block, turn_columns=True, turn_rows=True), grid, block)


def has_no_jump(order: Tensor, grid: Grid, block: int) -> bool:
    """Whether each token is followed by one in the same strip and at most one column further, or in the next strip."""
    steps = coordinates(order, grid).diff(dim=0).abs().amax(0).tolist()
    side = block ** (1 / sum(length > 1 for length in grid))
    return bool(steps[2] <= 1 and max(steps[:2]) <= 2 * 1.5 * side)  # lengths of bands are rounded


@settings(max_examples=200, deadline=None)
@given(grids, st.sampled_from((8, 32, 64, 128, 192)))
def test_the_curve_never_leaves_out_a_column(grid: Grid, block: int) -> None:
    assert coordinates(serpentine_order(grid, block), grid)[:, 2].diff().abs().le(1).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grid", [*GRIDS, (21, 30, 52), (5, 17, 1), (1, 1, 300), (40, 1, 30)])
def test_steps_from_strip_to_strip_are_short(grid: Grid, block: int) -> None:
    assert has_no_jump(serpentine_order(grid, block), grid, block)


@pytest.mark.parametrize("grid", [(1, 1, 61), (7, 1, 1), (1, 9, 1)])
def test_a_line_is_walked_from_end_to_end(grid: Grid) -> None:
    assert serpentine_order(grid, 16).tolist() == list(range(prod(grid)))


def test_tiles_of_a_boxlike_grid_are_boxes() -> None:
    """Where bands are exact, strips of 4 x 4 give cubes of 4, walked to and fro on every axis."""
    at = coordinates(serpentine_order((8, 8, 8), 64).view(-1, 64), (8, 8, 8)) // 4
    assert bool((at == at[:, :1]).all())
    assert bool((at[:, 0].diff(dim=0).abs().sum(1) == 1).all())


# ---- halves of tiles -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(grids, st.integers(0, 4), st.integers(1, 3), st.data())
def test_halving_keeps_the_tokens_and_cuts_the_longest_axis(
    grid: Grid, times: int, odd: int, data: st.DataObject
) -> None:
    """Of any tiles at all: each cell is parted where its longest axis is, and padding stays behind."""
    block, count = odd << times, prod(grid)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    tiles = cut(order[: data.draw(st.integers(1, count))], block)
    found = halve_tiles(tiles, grid, times)
    assert torch.equal(found.sort(1).values, tiles.sort(1).values)
    for level in range(times):
        for cell in found.view(len(found) << level, 2, -1):
            low, high = (coordinates(half[half >= 0], grid) for half in cell)
            assert bool((cell.flatten() < 0).int().diff().ge(0).all())
            if len(high):
                whole = torch.cat([low, high])
                axis = int((whole.amax(0) - whole.amin(0)).argmax())
                assert low[:, axis].max() <= high[:, axis].min()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_parts_are_more_compact_than_those_in_raster_order(grid: Grid, block: int) -> None:
    tiles = cut(serpentine_order(grid, block), block)
    tiles = tiles[: prod(grid) // block]  # without the one that has padding
    halved, raster = halve_tiles(tiles, grid, 4), tiles.sort(1).values
    # Between rows, the raster order cuts a picture's tile into halves that are as good, save for ragged ends of tiles.
    first = 0.97 if grid[0] > 1 else 1.01
    for times, share, of_curve in ((1, first, 1.0), (2, 0.8, 0.8), (3, 0.65, 0.65), (4, 0.6, 0.6)):
        parts, rows, runs = (spread(one.view(len(tiles) << times, -1), grid).mean() for one in (halved, raster, tiles))
        assert parts < share * rows, times
        assert parts < of_curve * runs, times
