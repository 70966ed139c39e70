"""Lists from a map: equal to lists from entries, with room behind the last offset, and no wait for a device."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from visparse_kernels import BlockLists, attend, lists_from_map
from visparse_kernels.attend.gluon_program import build_program
from visparse_kernels.bits import identity_order
from visparse_kernels.testing import check_attend
from visparse_kernels.testing_boxes import random_boxed_lists

SIZES = {"q_len": 60, "k_len": 90, "block_q": 16, "block_k": 32}
HEADS = torch.tensor([0, 1, -1, 0], dtype=torch.int32)


def orders(groups: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)

    def order(length: int, slots: int) -> torch.Tensor:
        table = torch.stack([torch.randperm(slots, generator=make) for _ in range(groups)])
        return torch.where(table < length, table, -1).to(torch.int32)

    return {"q_order": order(60, 80), "k_order": order(90, 128)}


def plain_orders() -> dict[str, torch.Tensor]:
    return {"q_order": identity_order(60, 16), "k_order": identity_order(90, 32)}


def draw(groups: int = 2, keep: float = 0.4, seed: int = 0) -> torch.Tensor:
    kept = torch.rand(groups, 5, 4, generator=torch.Generator().manual_seed(seed)) < keep
    kept[0, 2] = False  # an empty row
    return kept


def from_entries(kept: torch.Tensor, tables: dict[str, torch.Tensor]) -> BlockLists:
    group, row, cols = kept.nonzero(as_tuple=True)
    return BlockLists.from_entries(
        **SIZES, **tables, head_group=HEADS, rows=group * 5 + row, cols=cols, tile=torch.full_like(cols, -1)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_to_lists_from_entries(keep, groups, seed) -> None:
    kept, tables = draw(keep=keep, seed=seed), orders(groups, seed)
    lists = lists_from_map(kept, **SIZES, **tables, head_group=HEADS)
    wanted = from_entries(kept, tables)
    assert torch.equal(lists.full_offsets, wanted.full_offsets)
    assert torch.equal(lists.full_indices[: int(wanted.full_offsets[-1])], wanted.full_indices)
    assert torch.equal(lists.to_mask(), wanted.to_mask())
    assert lists.full_indices.shape == (2 * 5 * 4,)
    assert lists.validate() is lists
    assert lists.density == wanted.density
    assert lists.block_density == wanted.block_density


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_attend_takes_them(impl, keep, make_qkv) -> None:
    lists = lists_from_map(draw(keep=keep), **SIZES, **orders(2), head_group=HEADS)
    q, k, v = make_qkv(lists, batch=2)
    out, lse = attend(q, k, v, lists, return_lse=True, impl=impl)
    check_attend(out, lse, q, k, v, lists)
    assert bool((out[:, :, 2] == 0).all())


def test_one_order_of_one_axis_and_capacity() -> None:
    kept, tables = draw(), orders()
    whole = lists_from_map(kept, **SIZES, **tables, head_group=HEADS)
    flat = {name: table[0] for name, table in tables.items()}
    small = lists_from_map(kept, **SIZES, **flat, head_group=HEADS, capacity=2)
    assert small.full_indices.shape == (2 * 5 * 2,)
    assert torch.equal(small.to_mask(), whole.to_mask())


def test_boxes_are_carried_along() -> None:
    boxed = random_boxed_lists(grid=(2, 8, 16), q_box=(2, 8, 8), k_box=(2, 8, 8), head_group=[0])
    kept = torch.ones(1, boxed.n_q, boxed.n_k, dtype=torch.bool)
    lists = lists_from_map(
        kept,
        q_len=boxed.q_len,
        k_len=boxed.k_len,
        block_q=boxed.block_q,
        block_k=boxed.block_k,
        q_order=boxed.q_order,
        k_order=boxed.k_order,
        head_group=boxed.head_group,
        boxes=boxed.boxes,
    )
    assert lists.boxes is boxed.boxes
    assert int(lists.full_offsets[-1]) == kept.numel()


def test_room_to_spare_is_for_full_lists_only_and_checked_up_to_the_last_offset() -> None:
    kept = draw(keep=0.4)
    lists = lists_from_map(kept, **SIZES, **orders(), head_group=HEADS)
    spare = lists.full_indices.clone()
    spare[int(lists.full_offsets[-1]) :] = 99
    replace(lists, full_indices=spare).validate()
    spare[0] = 99
    with pytest.raises(ValueError, match=r"full_indices: wanted values from 0 to 3, got 0 to 99"):
        replace(lists, full_indices=spare).validate()
    with pytest.raises(ValueError, match=r"full_offsets: wanted offsets that rise from 0 to 5, got 0 to "):
        replace(lists, full_indices=lists.full_indices[:5].clone()).validate()
    masked = {"partial_indices": spare[:1], "partial_tiles": spare[:1]}
    with pytest.raises(ValueError, match=r"partial_tiles: wanted values from 0|partial_offsets: wanted offsets"):
        replace(lists, **masked).validate()


def test_other_views_stop_at_the_last_offset() -> None:
    kept, tables = draw(groups=1), orders()
    heads = torch.zeros(2, dtype=torch.int32)
    lists = lists_from_map(kept, **SIZES, **tables, head_group=heads)
    mask, _ = lists.to_flex()
    assert torch.equal(mask.to_dense().bool(), kept.expand(2, -1, -1)[None])
    runs = lists_from_map(kept[:, :4, :3], **SIZES, **plain_orders(), head_group=heads)
    program = build_program(runs)
    assert not isinstance(program, str), program
    assert torch.equal(program.offsets, runs.full_offsets)
    n = int(runs.full_offsets[-1])
    by_row = [sorted(program.blocks[a:b].tolist()) for a, b in pairwise(program.offsets.tolist())]
    assert by_row == [runs.full_indices[a:b].tolist() for a, b in pairwise(runs.full_offsets.tolist())]
    assert program.blocks.shape == (n + 1,)


def test_more_blocks_than_room_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"capacity: wanted room for all kept blocks, got 1 a row"):
        lists_from_map(draw(keep=0.9), **SIZES, **orders(), head_group=HEADS, capacity=1)


def test_nothing_depends_on_the_data_but_the_result() -> None:
    tables = orders()

    def build(kept):
        lists = lists_from_map(kept, **SIZES, **tables, head_group=HEADS, capacity=3)
        return lists.full_offsets, lists.full_indices

    # fake tensors hold no data: whatever would read a number, or size a tensor by one, raises here
    graph = make_fx(build, tracing_mode="fake", _allow_non_fake_inputs=True)(draw())
    other = draw(keep=0.2, seed=5)
    for got, wanted in zip(graph(other), build(other), strict=True):
        assert torch.equal(got, wanted)


def test_attend_on_fresh_lists_compiles_without_a_break(make_qkv) -> None:
    tables = orders()
    q, k, v = make_qkv(lists_from_map(draw(), **SIZES, **tables, head_group=HEADS))

    def run(kept):
        lists = lists_from_map(kept, **SIZES, **tables, head_group=HEADS, capacity=3)
        return attend(q, k, v, lists, impl="reference")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        kept = draw(keep=0.3, seed=seed)
        torch.testing.assert_close(compiled(kept), run(kept))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"kept: wanted bool \[groups, 5, 4\] .* got torch.float32 \[2, 5, 4\]"):
        lists_from_map(draw().float(), **SIZES, **orders(), head_group=HEADS)
    with pytest.raises(ValueError, match=r"kept: wanted bool \[groups, 5, 4\] .* got torch.bool \[2, 4, 5\]"):
        lists_from_map(draw().transpose(1, 2), **SIZES, **orders(), head_group=HEADS)
    with pytest.raises(ValueError, match=r"capacity: wanted 1 to 4 blocks a row, got 5; leave it out for 4"):
        lists_from_map(draw(), **SIZES, **orders(), head_group=HEADS, capacity=5)
