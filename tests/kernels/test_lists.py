"""Block lists: what they mean, how they are built, what they refuse."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import BlockLists
from visparse_kernels.bits import identity_order, pack_bits, unpack_bits
from visparse_kernels.boxes import Boxes, box_tokens
from visparse_kernels.testing import random_lists


def some_mask(heads: int = 3, q_len: int = 70, k_len: int = 101) -> torch.Tensor:
    mask = torch.rand(heads, q_len, k_len, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[0, :32, 32:64] = True
    mask[1] = False
    mask[2] = mask[0]
    return mask


def shuffled_order(length: int, slots: int, seed: int) -> torch.Tensor:
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
    return torch.where(order < length, order, -1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_mask_to_lists_and_back(shuffled: bool) -> None:
    mask = some_mask()
    orders = {"q_order": shuffled_order(70, 128, 1), "k_order": shuffled_order(101, 160, 2)} if shuffled else {}
    lists = BlockLists.from_mask(mask, 32, 32, **orders).validate()
    assert torch.equal(lists.to_mask(), mask)
    assert lists.head_group.tolist() == [0, -1, 0]  # equal heads share a group, an empty one is skipped
    assert lists.groups == 1
    assert lists.density == pytest.approx(mask.double().mean().item(), abs=1e-12)
    assert lists.density_per_head.tolist() == pytest.approx(mask.double().mean((1, 2)).tolist(), abs=1e-12)


def test_full_blocks_are_found_and_tiles_are_distinct() -> None:
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[0, :32, :32] = True  # full
    mask[0, :32, 32:64] = torch.eye(32, dtype=torch.bool)
    mask[0, 32:, 64:] = torch.eye(32, dtype=torch.bool)  # the same tile again
    lists = BlockLists.from_mask(mask, 32, 32)
    assert lists.full_offsets.tolist() == [0, 1, 1]
    assert lists.full_indices.tolist() == [0]
    assert lists.partial_offsets.tolist() == [0, 1, 2]
    assert lists.partial_indices.tolist() == [1, 2]
    assert lists.partial_tiles.tolist() == [0, 0]
    assert torch.equal(lists.tile_masks()[0], torch.eye(32, dtype=torch.bool))
    assert lists.block_density == pytest.approx(3 / 6)


def test_a_ragged_end_that_keeps_all_is_full() -> None:
    lists = BlockLists.from_mask(torch.ones(1, 40, 50, dtype=torch.bool), 32, 32)
    assert lists.full_indices.tolist() == [0, 1, 0, 1]
    assert lists.partial_indices.numel() == 0


def test_dense_keeps_every_pair() -> None:
    lists = BlockLists.dense(q_len=40, k_len=50, heads=2, block_q=16, block_k=32).validate()
    assert lists.to_mask().all()
    assert (lists.density, lists.block_density, lists.groups, lists.n_q, lists.n_k) == (1.0, 1.0, 1, 3, 2)


@pytest.mark.parametrize("shuffled", [False, True])
def test_density_counts_real_tokens_only(shuffled: bool) -> None:
    lists = random_lists(
        q_len=90, k_len=75, block_q=32, block_k=64, head_group=[0, 1, -1, 2], shuffled=shuffled, seed=3
    )
    assert lists.density_per_head.tolist() == pytest.approx(lists.to_mask().double().mean((1, 2)).tolist(), abs=1e-12)


def test_entries_may_come_in_any_order() -> None:
    given = {
        "q_len": 64,
        "k_len": 128,
        "block_q": 32,
        "block_k": 32,
        "head_group": torch.tensor([1, 0]),
        "q_order": None,
        "k_order": None,
    }
    rows, cols = torch.tensor([3, 0, 0, 1]), torch.tensor([2, 3, 1, 0])
    tile = torch.tensor([-1, 0, -1, 0])
    tiles = pack_bits(torch.eye(32, dtype=torch.bool))[None]
    lists = BlockLists.from_entries(**given, rows=rows, cols=cols, tile=tile, tiles=tiles).validate()
    again = BlockLists.from_entries(**given, rows=rows.flip(0), cols=cols.flip(0), tile=tile.flip(0), tiles=tiles)
    assert torch.equal(lists.to_mask(), again.to_mask())
    assert lists.full_offsets.tolist() == [0, 1, 1, 1, 2]
    assert lists.partial_offsets.tolist() == [0, 1, 2, 2, 2]
    assert lists.to_mask()[0, 32:, 64:96].all()  # head 0 has group 1
    assert lists.to_mask().sum().item() == 2 * 32 * 32 + 2 * 32


def test_bits_round_trip_and_their_order() -> None:
    mask = torch.rand(5, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)
    one = torch.zeros(64, dtype=torch.bool)
    one[32 + 5] = True
    assert pack_bits(one).tolist() == [0, 32]
    assert identity_order(3, 2).tolist() == [[0, 1, 2, -1]]
    with pytest.raises(ValueError, match="multiple of 32, got 33"):
        pack_bits(torch.ones(33, dtype=torch.bool))


def test_flex_attention_reads_the_same_mask() -> None:
    lists = random_lists(q_len=90, k_len=75, block_q=32, block_k=32, head_group=[0, 1, -1], seed=4)
    block_mask, keep = lists.to_flex()
    head, q, k = torch.arange(3)[:, None, None], torch.arange(90)[None, :, None], torch.arange(75)[None, None]
    assert torch.equal(keep(torch.tensor(0), head, q, k), lists.to_mask())
    assert block_mask.shape == (1, 3, lists.n_q * 32, lists.n_k * 32)
    visited = block_mask.to_dense()[0].bool()
    assert visited.sum().item() == round(lists.block_density * 3 * lists.n_q * lists.n_k)


def test_to_the_same_device_is_the_same_object() -> None:
    lists = random_lists(q_len=32, k_len=32, block_q=32, block_k=32, head_group=[0])
    assert lists.to("cpu") is lists
    assert lists.to("meta").device.type == "meta"


LISTS = random_lists(q_len=90, k_len=75, block_q=32, block_k=32, head_group=[0, 1], keep=0.9, seed=1)


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("block_k", 48, ValueError, "block_k: wanted a multiple of 32, got 48"),
        ("q_len", 0, ValueError, "q_len: wanted at least 1, got 0"),
        ("q_len", 100, ValueError, "q_order: wanted a multiple of the block size 32, at least 100 slots, got 96"),
        ("tiles", LISTS.tiles.long(), TypeError, "tiles: wanted an int32 tensor, got torch.int64"),
        ("tiles", LISTS.tiles[:, :16].contiguous(), ValueError, "tiles: wanted .n_tiles, 32, 1., got .7, 16, 1."),
        ("head_group", LISTS.tiles, ValueError, "head_group: wanted 1 axes"),
        ("q_order", LISTS.q_order.expand(3, -1).contiguous(), ValueError, "q_order: wanted 1 or 2 rows .* got 3"),
        ("q_order", LISTS.q_order.expand(2, -1), ValueError, "q_order: wanted a contiguous table"),
        ("full_offsets", LISTS.full_offsets[:-1], ValueError, r"wanted groups \* 3 \+ 1 elements"),
        ("partial_tiles", LISTS.partial_tiles[:-1], ValueError, "partial_tiles: wanted one tile per masked block"),
        ("tiles", LISTS.tiles.to("meta"), ValueError, "tiles: wanted all tables on one device"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(field: str, value: object, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        replace(LISTS, **{field: value})


def changed(table: torch.Tensor, index: int, value: int) -> torch.Tensor:
    table = table.clone()
    table.view(-1)[index] = value
    return table


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("q_order", changed(LISTS.q_order, 4, 5), "q_order: wanted every token in exactly one slot, got token 4 in 0"),
        ("k_order", changed(LISTS.k_order, 0, 75), "k_order: wanted values from -1 to 74, got 1 to 75|-1 to 75"),
        ("head_group", changed(LISTS.head_group, 0, 2), "head_group: wanted values from -1 to 1"),
        ("full_indices", changed(LISTS.full_indices, 0, 3), "full_indices: wanted values from 0 to 2"),
        ("partial_tiles", changed(LISTS.partial_tiles, 0, 7), "partial_tiles: wanted values from 0 to 6"),
        ("full_offsets", changed(LISTS.full_offsets, 0, 1), "full_offsets: wanted offsets that rise from 0"),
        ("partial_offsets", changed(LISTS.partial_offsets, 1, 99), "partial_offsets: wanted offsets that rise"),
    ],
)
def test_contents_that_break_the_contract_are_refused(field: str, value: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(LISTS, **{field: value}).validate()


def test_unsorted_and_doubly_listed_blocks_are_refused() -> None:
    dense = BlockLists.dense(q_len=32, k_len=64, heads=1, block_q=32, block_k=32)
    with pytest.raises(ValueError, match="strictly ascending key blocks in each row, got 1 before 0 in row 0"):
        replace(dense, full_indices=dense.full_indices.flip(0)).validate()
    tile = torch.zeros(1, 32, 1, dtype=torch.int32)
    both = replace(
        dense,
        partial_offsets=torch.tensor([0, 1], dtype=torch.int32),
        partial_indices=torch.tensor([1], dtype=torch.int32),
        partial_tiles=torch.tensor([0], dtype=torch.int32),
        tiles=tile,
    )
    with pytest.raises(ValueError, match="key block 1 of row 0 is in both lists"):
        both.validate()


@pytest.mark.parametrize(
    ("rows", "cols", "tile", "text"),
    [
        ([0, 0], [1, 1], [-1, -1], r"block \(row 0, column 1\) is given twice"),
        ([2], [0], [-1], "rows: wanted values from 0 to 1, got 2 to 2"),
        ([0], [-1], [-1], "cols: wanted values from 0 to 1, got -1 to -1"),
        ([0], [0], [0], "tile: wanted values from -1 to -1, got 0 to 0"),
        ([0], [0, 1], [-1], "three one-axis tensors of one length"),
    ],
)
def test_bad_entries_are_refused(rows: list[int], cols: list[int], tile: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BlockLists.from_entries(
            q_len=64,
            k_len=64,
            block_q=32,
            block_k=32,
            head_group=torch.tensor([0]),
            q_order=None,
            k_order=None,
            rows=torch.tensor(rows),
            cols=torch.tensor(cols),
            tile=torch.tensor(tile),
        )


def test_a_mask_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask: wanted bool \[heads, q_len, k_len\], got torch.float32 \[3, 4\]"):
        BlockLists.from_mask(torch.ones(3, 4), 32, 32)


def boxed_lists() -> BlockLists:
    """A grid of 2 x 6 x 9 with two tokens before it; key boxes overlap, and hang over at the end of rows."""
    grid, first, box = (2, 6, 9), 2, (1, 4, 8)
    starts = torch.tensor([[t, y, x] for t in range(2) for y in (0, 2) for x in (0, 1, 8)], dtype=torch.int32)
    run = torch.tensor([[-1, 0, 0]], dtype=torch.int32)
    aligned = torch.tensor([[t, y, x] for t in range(2) for y in (0, 4) for x in (0, 8)], dtype=torch.int32)
    words = torch.where(torch.arange(32) < 2, torch.arange(32), -1)[None].to(torch.int32)
    boxes = Boxes(
        grid=grid,
        first=first,
        q_box=(box,),
        k_box=(box,),
        q_starts=torch.cat([aligned, run])[None],
        k_starts=torch.cat([starts, run])[None],
    )
    return BlockLists.from_entries(
        q_len=110,
        k_len=110,
        block_q=32,
        block_k=32,
        head_group=torch.tensor([0, -1]),
        q_order=torch.cat([box_tokens(grid, first, box, aligned), words]).flatten(),
        k_order=torch.cat([box_tokens(grid, first, box, starts), words]).flatten(),
        rows=torch.tensor([0, 0, 1, 5, 8]),
        cols=torch.tensor([1, 12, 2, 9, 12]),
        tile=torch.tensor([-1, -1, -1, 0, -1]),
        tiles=torch.full((1, 32, 1), 0x0F0F0F0F, dtype=torch.int32),
        boxes=boxes,
    )


def test_boxes_mean_what_their_order_tables_say() -> None:
    lists = boxed_lists().validate()
    mask = lists.to_mask()
    token = 2 + (0 * 6 + 3) * 9 + 5  # frame 0, row 3, column 5: in the first query box
    seen = {2 + y * 9 + x for y in range(4) for x in range(1, 9)} | {0, 1}
    assert set(mask[0, token].nonzero().flatten().tolist()) == seen
    assert not mask[1].any()
    assert lists.density == pytest.approx(float(mask.float().mean()))
    assert set(lists.to("cpu").boxes.k_box) == {(1, 4, 8)}


def test_boxes_that_disagree_with_the_order_are_refused() -> None:
    lists = boxed_lists()
    moved = replace(lists.boxes, k_starts=lists.boxes.k_starts.clone())
    moved.k_starts[0, 3, 2] += 1
    with pytest.raises(ValueError, match=r"block 3 of k_order \(row 0\) holds token 20 in slot 0, but its box begins"):
        replace(lists, boxes=moved).validate()
    with pytest.raises(ValueError, match="q_box of row 0 is None, so wanted only runs"):
        replace(lists, boxes=replace(lists.boxes, q_box=(None,))).validate()
    with pytest.raises(ValueError, match=r"wanted k_starts \[1, 13, 3\]"):
        replace(lists, boxes=replace(lists.boxes, k_starts=moved.k_starts[:, 1:])).validate()


def test_a_query_that_keeps_a_key_twice_is_refused() -> None:
    lists = boxed_lists()
    twice = replace(
        lists, full_indices=torch.tensor([0, 1, 2, 12], dtype=torch.int32), full_offsets=lists.full_offsets.clone()
    )
    twice = replace(twice, full_offsets=torch.tensor([0, 2, 3, 3, 3, 3, 3, 3, 3, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="keeps token 3 2 times"):
        twice.validate()
