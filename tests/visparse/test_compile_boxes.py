from dataclasses import dataclass
from math import prod
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visparse.boxes import check_shape
from visparse.compile import clear_cache, compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order
from visparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip
from visparse_kernels import attend
from visparse_kernels.lists import BlockLists

STRIDED = Neighborhood(window=(18, 24, 24), stride=(16, 8, 8))


@dataclass(frozen=True, kw_only=True)
class Odd(Pattern):
    """No structure at all, and nothing that helps to compile it."""

    name: ClassVar[str] = "odd"

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        weights = q.new_tensor([7, 5, 3])
        return ((q * weights).sum(-1) + 11 * (k * weights).sum(-1)) % 6 == 0


def fitting(grid: Grid) -> list[Pattern]:
    window: Grid = tuple(min(length, size) for length, size in zip(grid, (2, 3, 4), strict=True))  # type: ignore
    return [
        Neighborhood(window=window),
        Neighborhood(window=window, stride=(1, 1, window[2]), causal=(True, False, False)),
        Neighborhood(window=(1, 1, 2), dilation=(1, 1, 2)),
        Neighborhood(window=grid),
        Radial(),
        Radial(variant="code", block=16, decay=0.5),
        Odd(),
        Dense(),
    ]


def expected_masks(patterns: list[Pattern], layout: Layout) -> Tensor:
    masks = torch.ones(len(patterns), layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(layout.before, layout.before + layout.visual)
    at = layout.coordinates()
    for mask, pattern in zip(masks, patterns, strict=True):
        if isinstance(pattern, Skip):
            mask[:] = False
        else:
            mask[inside, inside] = pattern.keep(at, at, layout.grid)
    return masks


def check(lists: BlockLists, patterns: list[Pattern], layout: Layout) -> None:
    """The lists mean the patterns, and every shape is one that the hardware can fetch."""
    lists.validate()
    assert torch.equal(lists.to_mask(), expected_masks(patterns, layout))
    assert lists.boxes is not None
    for box in filter(None, lists.boxes.q_box):
        check_shape("q", box, lists.block_q, layout.grid)
    for box in filter(None, lists.boxes.k_box):
        check_shape("k", box, lists.block_k, layout.grid)
    starts = lists.boxes.k_starts[lists.boxes.k_starts[..., 0] >= 0]
    if len(starts):
        ends = torch.stack([torch.tensor(box or (0, 0, 0)) for box in lists.boxes.k_box]).amax(0)
        assert bool((starts >= 0).all())
        assert len(lists.boxes.k_box) > 1 or bool((starts + ends <= torch.tensor(layout.grid)).all())


@pytest.mark.parametrize("grid", [(4, 7, 9), (3, 8, 8), (1, 1, 100), (2, 13, 5), (1, 17, 19)])
@pytest.mark.parametrize("extra", [(0, 0), (3, 70), (20, 0)])
@pytest.mark.parametrize("blocks", [(64, 32), (16, 64), (48, 32)])
def test_lists_mean_what_the_patterns_keep(grid: Grid, extra: tuple[int, int], blocks: tuple[int, int]) -> None:
    layout, patterns = Layout(grid, *extra), fitting(grid)
    check(compile_lists(patterns, layout, block_q=blocks[0], block_k=blocks[1], boxes=True), patterns, layout)


@pytest.mark.parametrize("blocks", [(128, 128), (192, 128)])
@pytest.mark.parametrize("layout", [Layout((5, 9, 17)), Layout((4, 16, 16), 5, 7)])
def test_block_sizes_of_the_hopper_kernel(blocks: tuple[int, int], layout: Layout) -> None:
    patterns = [*fitting(layout.grid), Skip()]
    check(compile_lists(patterns, layout, block_q=blocks[0], block_k=blocks[1], boxes=True), patterns, layout)


@pytest.mark.parametrize(
    "order",
    [
        "row-major",
        (2, 2, 8),
        Order((4, 2, 4), (1, 4, 8)),
        Order(None, (1, 8, 4)),
        Order((1, 32, 1), None),
        Order((8, 1, 4), (4, 8, 1)),
    ],
)
@pytest.mark.parametrize("extra", [(0, 0), (40, 9)])
def test_given_boxes(order: str | Grid | Order, extra: tuple[int, int]) -> None:
    layout = Layout((5, 11, 10), *extra)
    patterns = fitting(layout.grid)
    lists = compile_lists(patterns, layout, block_q=32, block_k=32, order=order, boxes=True)
    check(lists, patterns, layout)
    wanted = order if isinstance(order, Order) else Order() if order == "row-major" else Order(order, order)
    assert lists.boxes is not None
    assert set(lists.boxes.q_box) == {wanted.q}
    assert set(lists.boxes.k_box) == {wanted.k}


@st.composite
def neighbourhoods(draw: st.DrawFn) -> tuple[Neighborhood, Layout]:
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 14)))
    window = tuple(draw(st.integers(1, length)) for length in grid)
    stride = tuple(draw(st.integers(1, size)) for size in window)
    dilation = tuple(draw(st.integers(1, length // size)) for length, size in zip(grid, window, strict=True))
    causal = tuple(draw(st.booleans()) for _ in grid)
    pattern = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)  # type: ignore[arg-type]
    return pattern, Layout(grid, draw(st.integers(0, 9)), draw(st.integers(0, 40)))


@settings(max_examples=60, deadline=None)
@given(neighbourhoods(), st.sampled_from([(16, 32), (48, 32), (64, 64)]))
def test_any_neighbourhood(case: tuple[Neighborhood, Layout], blocks: tuple[int, int]) -> None:
    pattern, layout = case
    check(compile_lists([pattern], layout, block_q=blocks[0], block_k=blocks[1], boxes=True), [pattern], layout)


@pytest.mark.parametrize("order", ["auto", (2, 8, 8)])
def test_a_strided_window_is_perfectly_block_sparse(order: str | Grid) -> None:
    lists = compile_lists([STRIDED], Layout((30, 48, 80)), block_q=128, block_k=128, order=order, boxes=True)
    assert lists.full_offsets.diff().tolist() == [81] * 900
    assert len(lists.partial_indices) == 0
    assert lists.block_density == lists.density


def test_windows_of_stride_1_visit_few_blocks() -> None:
    lists = compile_lists(
        [Neighborhood(window=(18, 24, 24))], Layout((30, 48, 80)), block_q=128, block_k=128, boxes=True
    )
    assert (len(lists.full_indices) + len(lists.partial_indices)) / lists.n_q < 132
    assert lists.density == pytest.approx(18 * 24 * 24 / prod((30, 48, 80)), rel=1e-12)
    assert len(lists.tiles) < 300


def test_windows_need_no_alignment_with_tiles() -> None:
    """A window that begins at row 3 costs no more than one that begins at row 0."""
    lists = compile_lists(
        [Neighborhood(window=(1, 8, 8), stride=(1, 8, 8))], Layout((1, 23, 8)), block_q=64, block_k=64, boxes=True
    )
    assert lists.full_offsets.diff().tolist() == [1, 1, 1]
    assert lists.boxes is not None
    assert lists.boxes.k_starts[0].tolist() == [[0, 0, 0], [0, 8, 0], [0, 15, 0]]


def test_groups_of_different_orders_share_a_table_padded_with_unused_blocks() -> None:
    layout = Layout((4, 16, 16), before=3)
    patterns = [Neighborhood(window=(1, 8, 8)), Dense(), Neighborhood(window=(3, 5, 5)), Dense()]
    lists = compile_lists(patterns, layout, block_q=64, block_k=64, boxes=True)
    check(lists, patterns, layout)
    assert lists.boxes is not None
    assert lists.boxes.k_starts.shape[0] == 3
    unused = (lists.k_order.view(3, -1, 64) < 0).all(2)
    assert unused[1].any()
    assert bool((lists.boxes.k_starts[unused] == torch.tensor([-1, 0, 0])).all())


def test_equal_tables_are_stored_once() -> None:
    layout = Layout((4, 16, 16))
    patterns = [Radial(variant="code", block=64), Dense()]
    lists = compile_lists(patterns, layout, block_q=64, block_k=64, order="row-major", boxes=True)
    assert lists.q_order.shape[0] == lists.k_order.shape[0] == 1
    assert lists.block_density_per_head[1] == 1


def test_boxes_change_nothing_in_the_output() -> None:
    layout = Layout((3, 6, 11), 4, 9)
    patterns = [Neighborhood(window=(2, 3, 5)), Radial(), Dense(), Skip()]
    q, k, v = torch.randn(3, 1, layout.tokens, len(patterns), 8, dtype=torch.float64)
    plain, boxed = (
        attend(q, k, v, compile_lists(patterns, layout, block_q=32, block_k=32, boxes=boxes), impl="reference")
        for boxes in (False, True)
    )
    torch.testing.assert_close(boxed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"order": (2, 2, 2)}, "order: with boxes=True wanted a q tile of block_q = 64 tokens, got"),
        ({"order": Order(None, (16, 2, 2))}, r"wanted a k tile inside the grid \(2, 8, 8\), got \(16, 2, 2\)"),
        ({"order": Order((1, 2, 24)), "block_q": 48}, r"may have one factor 3\), got \(1, 2, 24\)"),
        ({"patterns": [Neighborhood(window=5)]}, "window: 5 .* on the frames axis, but the grid"),
        ({"patterns": [Neighborhood(window=5)], "order": (1, 8, 8)}, "window: 5 .* on the frames axis, but the grid"),
    ],
)
def test_errors(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        compile_lists(
            **(
                {"patterns": [Dense()], "layout": Layout((2, 8, 8)), "block_q": 64, "block_k": 64, "boxes": True}
                | changes
            )
        )


def test_results_are_cached_until_they_are_forgotten() -> None:
    patterns, layout = [Neighborhood(window=3)], Layout((3, 8, 8))
    first = compile_lists(patterns, layout, block_q=32, block_k=32, boxes=True)
    assert compile_lists(patterns, layout, block_q=32, block_k=32, boxes=True) is first
    assert compile_lists(patterns, layout, block_q=32, block_k=32).boxes is None
    clear_cache()
    assert compile_lists(patterns, layout, block_q=32, block_k=32, boxes=True) is not first


@pytest.mark.gpu
def test_building_on_the_gpu_gives_the_same_lists() -> None:
    layout = Layout((5, 11, 13), 3, 40)
    patterns = [*fitting(layout.grid), Skip()]
    here = compile_lists(patterns, layout, block_q=64, block_k=64, boxes=True)
    there = compile_lists(patterns, layout, block_q=64, block_k=64, boxes=True, device="cuda")
    assert there.device.type == "cuda"
    assert torch.equal(there.validate().to_mask().cpu(), here.to_mask())
    assert there.block_density == here.block_density
