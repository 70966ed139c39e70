import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import clear_cache, compile_lists, orders_of
from visparse.layout import Grid, Layout
from visparse.order import Order, choose_order, order_table, visual_blocks
from visparse.patterns import Dense, Neighborhood, Radial

grids = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 11))
tiles = st.none() | st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12))


@settings(max_examples=200, deadline=None)
@given(grids, tiles, st.integers(1, 40), st.integers(0, 50), st.integers(0, 50))
def test_every_token_has_one_slot_and_slots_are_few(
    grid: Grid, tile: Grid | None, block: int, before: int, after: int
) -> None:
    layout = Layout(grid, before, after)
    table = order_table(layout, tile, block)
    assert table.dtype == torch.int32
    assert sorted(table[table >= 0].tolist()) == list(range(layout.tokens))
    wanted = -(-layout.visual // block) + -(-layout.extra // block)
    assert len(table) == wanted * block
    visual = table[: -(-layout.visual // block) * block].view(-1, block)
    own = torch.where(visual < 0, -1, visual - before)
    assert torch.equal(own.long(), visual_blocks(layout, tile, block))


def test_row_major_keeps_the_order() -> None:
    assert order_table(Layout((1, 2, 3), before=2, after=1), None, 4).tolist() == [
        2,
        3,
        4,
        5,
        6,
        7,
        -1,
        -1,
        0,
        1,
        8,
        -1,
    ]


def test_tiles_are_blocks() -> None:
    blocks = visual_blocks(Layout((2, 4, 4)), (2, 2, 2), 8)
    assert blocks[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert blocks[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_ragged_tiles_come_last_grouped_by_the_cut_axes() -> None:
    layout = Layout((1, 3, 5))
    # 2 x 2 tiles: two whole ones, then those cut in width, then those cut in height, then the corner.
    assert visual_blocks(layout, (1, 2, 2), 4).flatten().tolist() == [
        *(0, 1, 5, 6, 2, 3, 7, 8),
        *(4, 9),
        *(10, 11, 12, 13),
        *(14, -1),
    ]


def test_whole_tiles_stay_aligned_on_a_ragged_grid() -> None:
    layout = Layout((5, 10, 9))
    blocks = visual_blocks(layout, (2, 4, 4), 32)
    at = layout.coordinates()[blocks[:8]]
    assert torch.equal(at.amax(1) - at.amin(1), torch.tensor([1, 3, 3]).expand(8, 3))


def test_choice_takes_tiles_for_windows_and_rows_for_ties() -> None:
    layout = Layout((4, 16, 16))
    chosen = choose_order(Neighborhood(window=(3, 5, 5)), layout, block_q=64, block_k=64)
    assert chosen.q is not None
    assert chosen.k is not None
    assert choose_order(Dense(), layout, block_q=64, block_k=64) == Order()
    assert choose_order(Neighborhood(window=9), Layout((1, 1, 500)), block_q=64, block_k=64) == Order()
    assert choose_order(Radial(variant="code", block=64), layout, block_q=64, block_k=64) == Order()


@pytest.mark.parametrize("grid", [(4, 16, 16), (5, 11, 13), (1, 24, 24), (3, 3, 40)])
def test_choice_visits_no_more_blocks_than_any_single_tile(grid: Grid) -> None:
    layout = Layout(grid)
    pattern = Neighborhood(window=(1, 3, 5))

    def visited(order: Order) -> int:
        q, k = visual_blocks(layout, order.q, 32), visual_blocks(layout, order.k, 32)
        at = layout.coordinates()
        kept = pattern.keep(at, at, grid)
        kept = torch.nn.functional.pad(kept, (0, 1, 0, 1))  # index -1 is padding
        return int(kept[q.flatten()][:, k.flatten()].view(len(q), 32, len(k), 32).any(3).any(1).sum())

    chosen = visited(choose_order(pattern, layout, block_q=32, block_k=32))
    for tile in [None, (1, 4, 8), (2, 4, 4)]:
        assert chosen <= visited(Order(tile, tile)) * 1.1
    assert chosen <= visited(Order())


def test_windows_over_all_frames_get_tiles_over_all_frames() -> None:
    layout = Layout((9, 32, 32))
    chosen = choose_order(Neighborhood(window=(9, 5, 5)), layout, block_q=64, block_k=64)
    assert chosen == Order((9, 2, 1), (9, 2, 1))


@pytest.mark.parametrize("tile", [(4, 4), (0, 4, 4), (2.0, 4, 4), (True, 4, 4)])
def test_a_bad_tile_is_an_error(tile: tuple) -> None:
    with pytest.raises(ValueError, match=r"order: wanted a tile of three positive ints .*for example \(4, 4, 4\)"):
        Order(q=tile)


def test_the_order_of_a_pattern_is_chosen_once() -> None:
    clear_cache()
    layout, pattern = Layout((3, 8, 9)), Neighborhood(window=(1, 3, 3))
    for heads in (1, 2, 4):  # as layers of one model, and a report, ask for it
        compile_lists([pattern] * heads, layout, block_q=16, block_k=32)
        orders_of([pattern] * heads, layout, block_q=16, block_k=32)
    assert choose_order.cache_info().misses == 1
