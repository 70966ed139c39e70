from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import visparse.distinct
from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order, order_table
from visparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip
from visparse_kernels.lists import BlockLists

GRIDS = [(4, 7, 9), (3, 8, 8), (1, 1, 100), (2, 13, 5)]


@dataclass(frozen=True, kw_only=True)
class Scattered(Pattern):
    """No structure at all, and nothing that helps to compile it."""

    name: ClassVar[str] = "scattered"

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        weights = q.new_tensor([7, 5, 3])
        return ((q * weights).sum(-1) + 11 * (k * weights).sum(-1)) % 6 == 0


def fitting(grid: Grid) -> list[Pattern]:
    window = tuple(min(length, size) for length, size in zip(grid, (2, 3, 4), strict=True))
    return [
        Neighborhood(window=window),  # type: ignore[arg-type]
        Neighborhood(window=window, stride=(1, 1, 3), causal=(True, False, False)),  # type: ignore[arg-type]
        Neighborhood(window=(1, 1, 2), dilation=(1, 1, 2)),
        Radial(),
        Radial(sink=False),
        Radial(variant="code", block=16, decay=0.5),
        Scattered(),
        Dense(),
    ]


def expected_mask(pattern: Pattern, layout: Layout) -> Tensor:
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(layout.before, layout.before + layout.visual)
    at = layout.coordinates()
    mask[inside, inside] = pattern.keep(at, at, layout.grid)
    return mask


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("extra", [(0, 0), (3, 70)])
@pytest.mark.parametrize("blocks", [(64, 32), (16, 64), (48, 96)])
@pytest.mark.parametrize("order", ["auto", "row-major", (2, 4, 4), Order(None, (1, 4, 8))])
def test_lists_mean_what_the_patterns_keep(grid: Grid, extra: tuple, blocks: tuple, order: str | Grid | Order) -> None:
    layout = Layout(grid, *extra)
    patterns = fitting(grid)
    lists = compile_lists(patterns, layout, block_q=blocks[0], block_k=blocks[1], order=order).validate()
    assert torch.equal(lists.to_mask(), torch.stack([expected_mask(pattern, layout) for pattern in patterns]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile", [None, (2, 4, 4)])
def test_blocks_and_tiles_are_exact(grid: Grid, tile: Grid | None) -> None:
    """Nothing is called partial that is full or empty, and tiles are distinct: the same as from a whole mask."""
    layout = Layout(grid, 3, 5)
    for pattern in fitting(grid):
        lists = compile_lists([pattern], layout, block_q=32, block_k=64, order=tile or "row-major")
        expected = BlockLists.from_mask(
            expected_mask(pattern, layout)[None],
            32,
            64,
            q_order=order_table(layout, tile, 32),
            k_order=order_table(layout, tile, 64),
        )
        for name in ("q_order", "k_order", "full_offsets", "full_indices", "partial_offsets", "partial_indices"):
            assert torch.equal(getattr(lists, name), getattr(expected, name)), (pattern, name)
        assert lists.tiles.shape == expected.tiles.shape
        assert torch.equal(lists.tiles[lists.partial_tiles.long()], expected.tiles[expected.partial_tiles.long()])


def test_heads_share_groups_and_tiles() -> None:
    window = Neighborhood(window=3)
    heads = [window, Skip(), Radial(), Neighborhood(window=3), Dense(), Skip(), window]
    lists = compile_lists(heads, Layout((3, 8, 8)), block_q=64, block_k=64, order="row-major")
    assert lists.head_group.tolist() == [0, -1, 1, 0, 2, -1, 0]
    assert lists.q_order.shape[0] == lists.k_order.shape[0] == 1
    alone = compile_lists([window, window], Layout((3, 8, 8)), block_q=64, block_k=64, order="row-major")
    assert alone.groups == 1
    assert len(torch.unique(lists.tiles, dim=0)) == len(lists.tiles)


def test_each_group_has_the_order_that_suits_it() -> None:
    patterns = [Neighborhood(window=(1, 8, 8), stride=(1, 8, 8)), Radial(variant="code", block=64)]
    layout = Layout((2, 32, 32), before=2)
    lists = compile_lists(patterns, layout, block_q=64, block_k=64).validate()
    assert lists.q_order.shape[0] == 2
    assert torch.equal(lists.q_order[1], order_table(layout, None, 64))
    assert not torch.equal(lists.q_order[0], lists.q_order[1])


def test_skipped_heads_see_nothing() -> None:
    lists = compile_lists([Skip(), Skip()], Layout((2, 4, 4), before=3), block_q=16, block_k=32).validate()
    assert lists.head_group.tolist() == [-1, -1]
    assert not lists.to_mask().any()
    assert lists.density == 0


def test_equal_calls_share_one_result() -> None:
    layout = Layout((2, 4, 4))
    first = compile_lists([Dense()], layout, block_q=16, block_k=32)
    assert compile_lists((Dense(),), Layout((2, 4, 4)), block_q=16, block_k=32, device=torch.device("cpu")) is first
    for other in (Layout((2, 4, 5)), Layout((2, 4, 4), before=1)):
        assert compile_lists([Dense()], other, block_q=16, block_k=32) is not first
    assert compile_lists([Dense()], layout, block_q=32, block_k=32) is not first
    assert compile_lists([Dense()], layout, block_q=16, block_k=64) is not first
    assert compile_lists([Radial()], layout, block_q=16, block_k=32) is not first


@pytest.mark.parametrize("order", ["row-major", (4, 4, 4)])
def test_density_of_a_large_grid_is_exact(order: str | Grid) -> None:
    grid, s = (21, 45, 80), 45 * 80
    lists = compile_lists([Neighborhood(window=(9, 15, 15))], Layout(grid), block_q=64, block_k=64, order=order)
    assert lists.density == pytest.approx(9 * 15 * 15 / (21 * s), rel=1e-12)
    radial = compile_lists([Radial(sink=False)], Layout(grid), block_q=64, block_k=64, order=order)
    kept = 0
    for distance in range(21):
        reach = s // 2 ** max(distance.bit_length() - 1, 0) - 1
        band = s + 2 * sum(s - apart for apart in range(1, reach + 1))
        kept += band * (21 - distance) * (1 if distance == 0 else 2)
    assert radial.density == pytest.approx(kept / (21 * s) ** 2, rel=1e-12)


def test_distinct_tiles_with_one_hash_stay_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = torch.randint(-5, 5, (40, 2, 1), dtype=torch.int32)
    monkeypatch.setattr(visparse.distinct, "_hash", lambda flat: torch.zeros(len(flat), dtype=torch.int64))
    distinct, index = visparse.distinct.distinct_rows(tiles)
    assert torch.equal(distinct[index], tiles)
    assert len(distinct) == len(torch.unique(tiles, dim=0))


def test_small_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((4, 7, 9), 2, 3)
    patterns = [Neighborhood(window=3), Radial(), Scattered()]
    whole = compile_lists(patterns, layout, block_q=16, block_k=32)
    monkeypatch.setattr(visparse.distinct, "_SCRATCH", 1)
    parts = compile_lists([*patterns, Dense()], layout, block_q=16, block_k=32)
    assert torch.equal(parts.to_mask()[:3], whole.to_mask())


@pytest.mark.parametrize(
    ("patterns", "changes", "error", "text"),
    [
        ([], {}, ValueError, "patterns: wanted one pattern per head, got none"),
        (["radial"], {}, TypeError, "patterns: wanted visparse patterns, got str 'radial'"),
        ([Dense()], {"block_k": 48}, ValueError, "block_k: wanted a positive multiple of 32, got 48"),
        ([Dense()], {"block_k": 0}, ValueError, "block_k: wanted a positive multiple of 32, got 0"),
        ([Dense()], {"block_q": 0}, ValueError, "block_q: wanted a positive int, got 0"),
        ([Dense()], {"order": "tiled"}, ValueError, "order: wanted 'auto', 'row-major', a tile such as .* got 'tiled'"),
        ([Dense()], {"order": (4, 4)}, ValueError, "order: wanted a tile of three positive ints"),
        ([Neighborhood(window=5)], {}, ValueError, "window: 5 .* on the frames axis, but the grid"),
    ],
)
def test_errors(patterns: list, changes: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compile_lists(patterns, Layout((2, 8, 8)), **({"block_q": 64, "block_k": 64} | changes))


@pytest.mark.gpu
def test_building_on_the_gpu_gives_the_same_lists() -> None:
    layout = Layout((5, 11, 13), 3, 40)
    patterns = [Neighborhood(window=3), Radial(), Radial(variant="code", block=64), Scattered(), Skip()]
    here = compile_lists(patterns, layout, block_q=64, block_k=64)
    there = compile_lists(patterns, layout, block_q=64, block_k=64, device="cuda")
    assert there.device.type == "cuda"
    assert torch.equal(there.validate().to_mask().cpu(), here.to_mask())
    assert there.density == here.density
