"""Programs of full blocks alone: equal to those of any lists, without a wait for a device, and kept within a budget."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from visparse_kernels import BlockLists, lists_from_map
from visparse_kernels.attend import gluon_program
from visparse_kernels.attend.gluon_program import Program, build_full_program, build_program, program_of
from visparse_kernels.attend.gluon_tables import tables_of
from visparse_kernels.boxes import box_tokens
from visparse_kernels.testing_boxes import random_boxed_lists

GRIDS = {
    "ragged": {"grid": (3, 9, 10), "before": 5, "after": 70},
    "even": {"grid": (2, 8, 16), "before": 0, "after": 64},
    "only hanging over": {"grid": (1, 3, 5)},
}


def layout(name: str, q_box=(2, 4, 8), seed: int = 0) -> BlockLists:
    """Lists of which only the tables matter; query tables of their own where there are several query boxes."""
    groups = list(range(len(q_box))) if isinstance(q_box, list) else [0]
    lists = random_boxed_lists(**GRIDS[name], q_box=q_box, k_box=(1, 8, 8), head_group=groups, seed=seed)
    if name != "even":
        return lists
    starts = torch.tensor([[0, 0, 0], [0, 0, 8], [1, 0, 0], [1, 0, 8], [-1, 0, 256]], dtype=torch.int32)
    tokens = [box_tokens((2, 8, 16), 0, (1, 8, 8), starts[:4]), torch.arange(256, 320, dtype=torch.int32)[None]]
    boxes = replace(lists.boxes, k_box=((1, 8, 8),), k_starts=starts[None])
    return replace(lists, k_order=torch.cat(tokens).view(1, -1), boxes=boxes)


def fresh(kept: torch.Tensor, tables: BlockLists, head_group: torch.Tensor, capacity=None) -> BlockLists:
    boxes = replace(tables.boxes, k_box=tables.boxes.k_box[:1], k_starts=tables.boxes.k_starts[:1])
    return lists_from_map(
        kept,
        q_len=tables.q_len,
        k_len=tables.k_len,
        block_q=tables.block_q,
        block_k=tables.block_k,
        q_order=tables.q_order,
        k_order=tables.k_order[:1],
        head_group=head_group,
        boxes=boxes,
        capacity=capacity,
    )


def draw(tables: BlockLists, groups: int, keep: float, seed: int = 0) -> torch.Tensor:
    kept = torch.rand(groups, tables.n_q, tables.n_k, generator=torch.Generator().manual_seed(seed)) < keep
    kept[:, 1::3] &= kept[:, 1::3].cumsum(-1) <= 1  # short rows, and empty ones at both ends
    kept[0, 0] = False
    kept[-1, -1] = False
    return kept


def entries(program: Program, row: int) -> tuple[set, set]:
    """What a row visits: (block, start), and (block, start, mask) of blocks with padding."""
    first, last = program.offsets[row : row + 2].tolist()
    plain = first + int(program.unmasked[row])
    assert bool((program.masks[first:plain] == -1).all())
    visited = list(zip(program.blocks[first:last].tolist(), program.starts[first:last].tolist(), strict=True))
    masks = [tuple(program.tiles[i].flatten().tolist()) for i in program.masks[plain:last].tolist()]
    assert bool((program.masks[plain:last] >= 0).all())
    return set(visited[: plain - first]), set(zip(visited[plain - first :], masks, strict=True))


def same(got: Program, wanted: Program, ragged: bool) -> None:
    for name in ("offsets", "unmasked", "q_starts", "q_whole"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        assert getattr(got, name).dtype == getattr(wanted, name).dtype, name
    for name in ("starts", "masks", "blocks", "tiles"):
        assert getattr(got, name).dtype == getattr(wanted, name).dtype, name
    for row in range(len(got.unmasked)):
        assert entries(got, row) == entries(wanted, row), row
    assert got.skipped == wanted.skipped
    for part, other in zip(got.parts, wanted.parts, strict=True):
        assert torch.equal(part.heads, other.heads)
        assert torch.equal(part.groups, other.groups)
        shapes = ("q_box", "k_box", "q_runs", "k_runs")
        assert [getattr(part, name) for name in shapes] == [getattr(other, name) for name in shapes]
        assert part.masked == ragged >= other.masked


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("capacity", [None, 0.9])
@pytest.mark.parametrize("q_box", [(2, 4, 8), [(2, 4, 8), (1, 8, 8), None]])
def test_the_same_program_as_any_lists_get(name, keep, capacity, q_box) -> None:
    tables = layout(name, q_box)
    for seed in range(2):
        kept = draw(tables, 3, keep, seed)
        room = None
        if capacity is not None:
            most = -(-int(kept.sum()) // kept.shape[:2].numel())
            room = max(1, min(tables.n_k, most))
        lists = fresh(kept, tables, torch.tensor([2, 0, -1, 1, 0], dtype=torch.int32), room)
        lists.full_indices[int(lists.full_offsets[-1]) :] = 99  # what is behind the last offset means nothing
        ragged = bool((lists.k_order < 0).any())
        got, wanted = build_full_program(lists), build_program(lists)
        assert isinstance(wanted, Program)
        same(got, wanted, ragged)
        assert ragged == (name != "even")
        # the kernel reads the place of an empty row, and one place ahead
        assert len(got.starts) == len(got.masks) == len(got.blocks) == len(lists.full_indices) + 1
        assert bool(((got.blocks >= 0) & (got.blocks < lists.n_k)).all())
        assert bool((got.masks < len(got.tiles)).all())


def test_no_group_at_all() -> None:
    tables = layout("ragged")
    kept = torch.zeros(0, tables.n_q, tables.n_k, dtype=torch.bool)
    program = build_full_program(fresh(kept, tables, torch.tensor([-1, -1], dtype=torch.int32)))
    assert (program.parts, program.skipped) == ((), True)


def test_which_lists_get_it(monkeypatch) -> None:
    def refuse(lists: BlockLists) -> None:
        raise AssertionError

    monkeypatch.setattr(gluon_program, "build_full_program", refuse)
    masked = random_boxed_lists(grid=(2, 8, 16), q_box=(2, 4, 8), k_box=(1, 8, 8), head_group=[0], partial=1)
    assert isinstance(program_of(masked), Program)
    many = random_boxed_lists(
        grid=(2, 8, 16), q_box=(2, 4, 8), k_box=[(1, 8, 8), (2, 4, 8)], head_group=[0, 1], partial=0
    )  # key blocks of each group's own
    assert isinstance(program_of(many), Program)
    with pytest.raises(ValueError, match=r"lists: wanted boxes, and one row in k_order"):
        tables_of(many)
    tables = layout("even")
    with pytest.raises(AssertionError):
        program_of(fresh(draw(tables, 1, 0.5), tables, torch.zeros(1, dtype=torch.int32)))


@pytest.mark.parametrize("name", ["ragged", "even"])
def test_known_tables_are_not_read_again(name) -> None:
    tables, heads = layout(name), torch.tensor([0, 1, -1], dtype=torch.int32)
    fields = ("offsets", "unmasked", "starts", "masks", "blocks")
    first = fresh(draw(tables, 2, 0.5), tables, heads)
    build_full_program(first)

    def build(offsets: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        program = build_full_program(replace(first, full_offsets=offsets, full_indices=indices))
        return tuple(getattr(program, field) for field in fields)

    # fake tensors hold no data: whatever would read a number, or size a tensor by one, raises here
    trace = make_fx(build, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = trace(first.full_offsets.clone(), first.full_indices.clone())
    other = fresh(draw(tables, 2, 0.3, seed=5), tables, heads)
    wanted = build_full_program(other)
    for got, field in zip(graph(other.full_offsets, other.full_indices), fields, strict=True):
        assert torch.equal(got, getattr(wanted, field))


def test_tables_are_known_by_their_memory() -> None:
    tables, heads = layout("ragged"), torch.zeros(1, dtype=torch.int32)
    kept = draw(tables, 1, 0.5)
    one, two = (fresh(kept, tables, heads) for _ in range(2))
    assert one.k_order is not two.k_order  # `fresh` cuts its row out each time
    assert tables_of(one) is tables_of(two)
    other = layout("ragged", seed=1)
    assert tables_of(fresh(kept[:, : other.n_q, : other.n_k], other, heads)) is not tables_of(one)
    assert build_full_program(one).parts is build_full_program(two).parts
    assert build_full_program(fresh(kept, tables, heads.clone())).parts is not build_full_program(one).parts


def test_a_program_goes_with_its_lists() -> None:
    tables, heads = layout("ragged"), torch.zeros(1, dtype=torch.int32)
    gc.collect()
    before = len(gluon_program._full_programs)
    lists = [fresh(draw(tables, 1, 0.5, seed), tables, heads) for seed in range(3)]
    programs = [program_of(one) for one in lists]
    assert len({id(program) for program in programs}) == 3
    assert program_of(lists[0]) is programs[0]
    assert len(gluon_program._full_programs) == before + 3
    del lists
    assert len(gluon_program._full_programs) == before


def test_no_more_is_kept_than_the_budget(monkeypatch) -> None:
    tables, heads = layout("ragged"), torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(gluon_program, "_full_programs", {})
    lists = [fresh(draw(tables, 1, 0.5, seed), tables, heads) for seed in range(4)]
    size = build_full_program(lists[0]).nbytes
    monkeypatch.setattr(gluon_program, "_BUDGET", int(2.5 * size))
    programs = [program_of(one) for one in lists]
    assert len(gluon_program._full_programs) == 2
    assert program_of(lists[3]) is programs[3]
    assert program_of(lists[0]) is not programs[0]  # the oldest went first
    assert len(gluon_program._full_programs) == 2
    monkeypatch.setattr(gluon_program, "_BUDGET", size - 1)
    gluon_program._full_programs.clear()
    assert isinstance(program_of(lists[1]), Program)
    assert len(gluon_program._full_programs) == 0
