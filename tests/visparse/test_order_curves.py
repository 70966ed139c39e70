from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists, orders_of
from visparse.layout import Grid, Layout, coordinates
from visparse.order import Order, choose_order, order_table, try_orders, visual_blocks
from visparse.order_curves import CURVES, curve_order
from visparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip
from visparse_kernels import attend

GRIDS: list[Grid] = [(3, 5, 7), (1, 11, 13), (7, 1, 5), (1, 1, 61), (5, 3, 1), (2, 17, 3), (4, 8, 8), (1, 1, 1)]
grids = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 13))


@settings(max_examples=200, deadline=None)
@given(grids, st.sampled_from(CURVES), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_every_token_has_one_slot(grid: Grid, curve: str, block: int, before: int, after: int) -> None:
    layout = Layout(grid, before, after)
    table = order_table(layout, curve, block)
    assert sorted(table[table >= 0].tolist()) == list(range(layout.tokens))
    assert len(table) == (-(-layout.visual // block) + -(-layout.extra // block)) * block
    assert visual_blocks(layout, curve, block).flatten()[: layout.visual].tolist() == curve_order(curve, grid).tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_pixel_major_counts_frames_first(grid: Grid) -> None:
    frames, height, width = grid
    wanted = [(t * height + y) * width + x for y in range(height) for x in range(width) for t in range(frames)]
    assert curve_order("pixel-major", grid).tolist() == wanted


@pytest.mark.parametrize("grid", GRIDS)
def test_z_order_sorts_by_the_bits_written_in_turn(grid: Grid) -> None:
    """Bits are written as text, highest first: one of each axis, then the next of each."""
    bits = (max(grid) - 1).bit_length()

    def word(token: int) -> str:
        at = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
        axes = [f"{place:0{bits}b}" for place, length in zip(at, grid, strict=True) if length > 1]
        return "".join("".join(digits) for digits in zip(*axes, strict=True))

    assert curve_order("z-order", grid).tolist() == sorted(range(prod(grid)), key=word)


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 16, 16), (1, 16, 16), (32, 1, 32), (4, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_hilbert_takes_single_steps_and_fills_every_cell_before_it_leaves(grid: Grid) -> None:
    """Both together make a curve a Hilbert curve: neighbours are one step apart, and cells are whole stretches."""
    at = coordinates(curve_order("hilbert", grid), grid)
    assert bool((at.diff(dim=0).abs().sum(1) == 1).all())
    axes = sum(length > 1 for length in grid)
    side = 2
    while side < max(grid):
        cells = (at // side).view(-1, side**axes, 3)
        assert bool((cells == cells[:, :1]).all())
        side *= 2


@pytest.mark.parametrize("grid", GRIDS)
def test_a_ragged_hilbert_curve_is_the_whole_one_with_places_left_out(grid: Grid) -> None:
    side = 1 << (max(grid) - 1).bit_length()
    cube: Grid = tuple(side if length > 1 else 1 for length in grid)  # type: ignore[assignment]
    at = coordinates(curve_order("hilbert", cube), cube)
    inside = at[(at < torch.tensor(grid)).all(1)]
    assert torch.equal(coordinates(curve_order("hilbert", grid), grid), inside)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ["row-major", "frame-major", *CURVES, (2, 2, 4), "auto"])
@pytest.mark.parametrize("extra", [(0, 0), (3, 40)])
def test_lists_in_every_order_mean_the_pattern(grid: Grid, order: str | Grid, extra: tuple[int, int]) -> None:
    layout = Layout(grid, *extra)
    window: Grid = tuple(min(length, size) for length, size in zip(grid, (2, 3, 4), strict=True))  # type: ignore
    patterns: list[Pattern] = [
        Neighborhood(window=window),
        Radial(),
        Radial(variant="code", block=4, decay=0.5),
        Dense(),
        Skip(),
    ]
    lists = compile_lists(patterns, layout, block_q=16, block_k=32, order=order).validate()
    at = layout.coordinates()
    inside = slice(layout.before, layout.before + layout.visual)
    for pattern, mask in zip(patterns, lists.to_mask(), strict=True):
        wanted = torch.full((layout.tokens,) * 2, not isinstance(pattern, Skip))
        wanted[inside, inside] = pattern.keep(at, at, grid)
        assert torch.equal(mask, wanted), pattern


def test_the_output_does_not_depend_on_the_order() -> None:
    layout = Layout((3, 5, 7), 2, 5)
    patterns = [Neighborhood(window=(2, 3, 3)), Radial()]
    q, k, v = torch.randn(3, 1, layout.tokens, 2, 8, dtype=torch.float64)
    plain, *others = (
        attend(q, k, v, compile_lists(patterns, layout, block_q=16, block_k=32, order=order), impl="reference")
        for order in ("row-major", *CURVES)
    )
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12)


def test_automatic_choice_takes_a_curve_where_it_visits_clearly_fewer_blocks() -> None:
    window, layout = Neighborhood(window=(8, 16, 16)), Layout((13, 30, 45))
    visited = try_orders(window, layout, block_q=128, block_k=64)
    tiles = min(count for order, count in visited.items() if order.curve is None)
    assert visited[Order(curve="hilbert")] < 0.95 * tiles
    assert choose_order(window, layout, block_q=128, block_k=64) == Order(curve="hilbert")
    # Less than 5 % better is not enough: masks of a curve are all different.
    window, layout = Neighborhood(window=(12, 16, 16)), Layout((21, 30, 52))
    visited = try_orders(window, layout, block_q=64, block_k=64)
    assert min(visited, key=visited.__getitem__) == Order(curve="z-order")
    assert choose_order(window, layout, block_q=64, block_k=64).curve is None


def test_a_grid_that_tiles_do_not_divide_wastes_little() -> None:
    """21 x 45 x 80 tokens; windows and strides are multiples of the tile. Padding is counted as waste, too."""
    layout = Layout((21, 45, 80))
    lists = compile_lists([Neighborhood(window=(12, 24, 32), stride=(4, 8, 8))], layout, block_q=128, block_k=64)
    assert lists.density > 0.92 * lists.block_density


def test_blocks_with_a_factor_3_have_tiles_of_3_frames() -> None:
    window, layout = Neighborhood(window=(9, 27, 24), stride=(3, 9, 8)), Layout((21, 45, 80))
    visited = try_orders(window, layout, block_q=192, block_k=32)
    best = min(visited, key=visited.__getitem__)
    assert best.q == (3, 8, 8)
    assert visited[best] < 0.8 * min(count for order, count in visited.items() if order.q is None or order.q[0] != 3)


def test_counts_of_orders_are_those_of_the_lists() -> None:
    """For windows the bound of `cover` is met exactly by blocks that are whole tiles."""
    window, layout = Neighborhood(window=(3, 5, 5)), Layout((4, 16, 16))
    visited = try_orders(window, layout, block_q=32, block_k=32)
    assert [order for order in visited if order.curve] == [Order(curve=curve) for curve in CURVES]
    for order, count in visited.items():
        lists = compile_lists([window], layout, block_q=32, block_k=32, order=order)
        exact = len(lists.full_indices) + len(lists.partial_indices)
        assert exact == count if order.curve is None else exact <= count


def test_curves_that_change_nothing_are_not_tried() -> None:
    def tried(grid: Grid) -> set[str | None]:
        return {order.curve for order in try_orders(Dense(), Layout(grid), block_q=32, block_k=32)}

    assert tried((1, 1, 500)) == {None}
    assert tried((1, 16, 16)) == {None, "z-order", "hilbert"}


def test_the_chosen_order_is_said_in_words() -> None:
    layout = Layout((4, 16, 16), 2)
    patterns = [Neighborhood(window=(3, 5, 5)), Skip(), Dense()]
    chosen = orders_of(patterns, layout, block_q=64, block_k=64)
    assert chosen == [choose_order(patterns[0], layout, block_q=64, block_k=64), None, Order()]
    assert str(Order()) == "row-major"
    assert str(Order((2, 4, 8), (2, 4, 8))) == "tiles 2x4x8"
    assert str(Order(None, (1, 8, 8))) == "queries row-major, keys 1x8x8"
    assert str(Order(curve="hilbert")) == "hilbert"
    assert orders_of(patterns, layout, block_q=64, block_k=64, order="frame-major") == [Order(), None, Order()]
    boxes = orders_of(patterns, layout, block_q=64, block_k=64, boxes=True)
    lists = compile_lists(patterns, layout, block_q=64, block_k=64, boxes=True)
    assert lists.boxes is not None
    assert [boxes[0] and boxes[0].q, boxes[2] and boxes[2].q] == list(lists.boxes.q_box)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Order(curve="hilbrt"), "wanted a curve of pixel-major, z-order, hilbert, got 'hilbrt'; did you mean"),
        (lambda: Order(q=(1, 2, 3), curve="hilbert"), r"wanted a curve or tiles, got the curve 'hilbert' and .*leave"),
        (lambda: lists_of(order="zorder"), "order: wanted 'auto', .* got 'zorder'; .*did you mean 'z-order'"),
        (lambda: lists_of(order="hilbert", boxes=True), "with boxes=True wanted tiles or row-major, got the curve"),
    ],
)
def test_errors(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def lists_of(**changes):
    return compile_lists([Dense()], Layout((2, 4, 4)), block_q=16, block_k=32, **changes)
