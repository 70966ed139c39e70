"""The Hopper implementation as far as it goes without a GPU: what it serves, its programs, what it can fetch."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import BlockLists, explain, preferred_blocks, prefers_boxes
from visparse_kernels.attend import gluon_impl
from visparse_kernels.attend.gluon_program import Program, build_program, program_of, run_starts
from visparse_kernels.attend.gluon_tables import pack_starts
from visparse_kernels.bits import unpack_bits
from visparse_kernels.testing import random_lists
from visparse_kernels.testing_boxes import random_boxed_lists

CUDA = torch.device("cuda")


def test_without_a_gpu_the_reason_says_so(monkeypatch) -> None:
    monkeypatch.setattr(gluon_impl, "missing", lambda: None)
    assert gluon_impl.can_run(torch.device("cpu"), torch.bfloat16, 128, 128, 128) == (
        "needs tensors on a CUDA device, got cpu"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gluon_impl.can_run(CUDA, torch.bfloat16, 128, 128, 128) == "needs a GPU, and PyTorch finds none"
    assert not prefers_boxes("cuda", 128)
    assert preferred_blocks("cuda", 128) == (128, 64)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((torch.float32, 128, 128, 128), "needs bf16 or fp16, got torch.float32"),
        ((torch.bfloat16, 96, 128, 128), "needs a head_dim of 64 or 128, got 96"),
        ((torch.bfloat16, 128, 192, 128), "needs block_q in [128] and block_k 128 for this head_dim, got 192 and 128"),
        (
            (torch.bfloat16, 64, 192, 64),
            "needs block_q in [128, 192] and block_k 128 for this head_dim, got 192 and 64",
        ),
        ((torch.bfloat16, 64, 192, 128), None),
    ],
)
def test_what_it_serves_on_hopper(case, reason, monkeypatch) -> None:
    monkeypatch.setattr(gluon_impl, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gluon_impl, "_capability", lambda device: (9, 0))
    assert gluon_impl.can_run(CUDA, *case) == reason


def test_other_gpus_are_refused_and_keep_their_block_sizes(monkeypatch) -> None:
    monkeypatch.setattr(gluon_impl, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gluon_impl, "_capability", lambda device: (8, 0))
    assert gluon_impl.can_run(CUDA, torch.bfloat16, 128, 128, 128) == (
        "needs a Hopper GPU (compute capability 9.0), got 8.0"
    )
    assert preferred_blocks("cuda", 64) == (128, 64)
    monkeypatch.setattr(gluon_impl, "_capability", lambda device: (9, 0))
    assert preferred_blocks("cuda", 64) == (192, 128)
    assert preferred_blocks("cuda", 64, torch.float32) == (128, 64)


@pytest.mark.parametrize(("version", "served"), [("3.5.1", False), ("3.6.0", True), ("3.8.2", True), ("3.9.0", False)])
def test_only_tried_versions_of_triton_are_served(version, served, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    why = gluon_impl.missing.__wrapped__()
    if served and why is not None:
        pytest.skip(why)
    assert (why is None) == served
    if not served:
        assert why == f"needs Triton 3.6 to 3.8 (Gluon changes with every release), got {version}"


def test_the_reason_reaches_the_report() -> None:
    lists = random_lists(q_len=100, k_len=100, block_q=128, block_k=128, head_group=[0])
    name, usable, reason = explain(torch.zeros(1, 100, 1, 64), lists)[0]
    assert (name, usable) == ("gluon", False)
    assert reason == "needs tensors on a CUDA device, got cpu"


def expand(lists: BlockLists, program: Program) -> torch.Tensor:
    """The token mask [H, Sq, Sk] that a program means, from its entries alone."""
    mask = torch.zeros(lists.heads, lists.q_len + 1, lists.k_len + 1, dtype=torch.bool)
    tiles = unpack_bits(program.tiles)
    k_order = lists.k_order.view(-1, lists.n_k, lists.block_k)
    for part in program.parts:
        for head, group in zip(part.heads.tolist(), part.groups.tolist(), strict=True):
            order = lists.q_order[group if len(lists.q_order) > 1 else 0].view(lists.n_q, -1).long()
            keys = k_order[group if len(k_order) > 1 else 0].long()
            for block in range(lists.n_q):
                row = group * lists.n_q + block
                first, last = program.offsets[row : row + 2].tolist()
                for entry in range(first, last):
                    masked = entry - first >= int(program.unmasked[row])
                    assert masked == (int(program.masks[entry]) >= 0)
                    kept = tiles[program.masks[entry]] if masked else torch.ones(lists.block_q, lists.block_k).bool()
                    columns = keys[program.blocks[entry]]
                    assert not kept[:, columns < 0].any()  # padding is masked
                    mask[head, order[block][:, None], columns[None]] |= kept
    return mask[:, :-1, :-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_program_means_what_the_lists_mean(seed) -> None:
    lists = [
        random_lists(q_len=200, k_len=300, block_q=64, block_k=64, head_group=[0, -1, 1, 0], seed=seed),
        random_boxed_lists(
            grid=(3, 9, 10),
            before=5,
            after=70,
            q_box=(2, 4, 8),
            k_box=[(1, 8, 8), None],
            head_group=[1, 0, -1],
            seed=seed,
        ),
    ]
    for one in lists:
        program = build_program(one)
        assert isinstance(program, Program)
        assert program.skipped
        assert torch.equal(expand(one, program), one.to_mask())


def test_starts_point_at_the_first_token_of_a_block() -> None:
    lists = random_boxed_lists(
        grid=(3, 9, 10), before=5, after=70, q_box=(2, 4, 8), k_box=[(1, 8, 8), None], head_group=[0, 1]
    )
    program = build_program(lists)
    assert isinstance(program, Program)
    first = lists.k_order.view(2, lists.n_k, 64)[:, :, 0]
    group = torch.arange(2).repeat_interleave(program.offsets.diff().view(2, -1).sum(1))
    for start, block, at in zip(program.starts[:-1].tolist(), program.blocks[:-1], group, strict=True):
        frame, row, column = start >> 48, (start >> 32) & 0xFFFF, start & 0x7FFFFFFF
        token = column if frame < 0 else 5 + (frame * 9 + row) * 10 + column
        assert int(first[at, block]) in (token, -1)  # blocks that fill up a shorter table hold nothing


def test_starts_are_packed_without_loss() -> None:
    starts = torch.tensor([[-1, 0, 2**31 - 1], [32767, 65535, 65535], [0, 0, 0], [-1, 0, 0]], dtype=torch.int32)
    packed = pack_starts(starts)
    unpacked = torch.stack([packed >> 48, (packed >> 32) & 0xFFFF, packed & 0x7FFFFFFF], -1)
    assert torch.equal(unpacked.to(torch.int32), starts)


def test_runs_are_found_and_other_orders_refused() -> None:
    order = torch.tensor([[4, 5, 6, 7, 8, 9, -1, -1, -1, -1, -1, -1, 0, 1, 3, 2]], dtype=torch.int32)
    assert run_starts(order, 4)[0, :, 2].tolist() == [4, 8, 0, -1]
    shuffled = random_lists(q_len=100, k_len=100, block_q=64, block_k=64, head_group=[0], shuffled=True)
    assert gluon_impl.cannot_fetch(shuffled) == (
        "the query order is made of neither runs nor boxes; compile the lists with boxes=True"
    )


def test_a_program_is_built_once_and_goes_with_its_lists() -> None:
    from visparse_kernels.attend import gluon_program

    lists = random_lists(q_len=100, k_len=100, block_q=64, block_k=64, head_group=[0])
    before = len(gluon_program._programs)
    assert program_of(lists) is program_of(replace(lists))
    assert program_of(replace(lists, head_group=torch.tensor([-1], dtype=torch.int32))) is not program_of(lists)
    assert len(gluon_program._programs) == before + 2
    del lists
    assert len(gluon_program._programs) == before


@pytest.mark.parametrize(
    ("box", "groups", "part", "step"),
    [
        (None, 2, None, (0, 0, 0)),
        ((2, 8, 8), 2, (1, 8, 8), (1, 0, 0)),
        ((1, 16, 8), 2, (1, 8, 8), (0, 8, 0)),
        ((1, 1, 128), 2, (1, 1, 64), (0, 0, 64)),
        ((6, 4, 8), 3, (2, 4, 8), (2, 0, 0)),
    ],
)
def test_query_boxes_are_cut_for_the_warpgroups(box, groups, part, step) -> None:
    assert gluon_impl.split(box, groups) == (part, step)


@pytest.mark.parametrize(("box", "groups"), [((3, 8, 8), 2), ((2, 12, 8), 3), ((1, 8, 16), 3)])
def test_boxes_that_cannot_be_cut_are_refused(box, groups) -> None:
    with pytest.raises(ValueError, match=rf"boxes: wanted a query box of {groups} equal boxes, .*, got \({box[0]}, "):
        gluon_impl.split(box, groups)


def test_what_tma_can_read() -> None:
    x = torch.zeros(2, 100, 3, 64, dtype=torch.bfloat16)
    same = [
        x,
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.zeros(2, 100, 3, 3, 64, dtype=x.dtype)[:, :, 1],
        x[:1, 3:],
    ]
    assert all(gluon_impl.fetchable(one) is one for one in same)
    copied = [
        torch.zeros(2, 100, 3, 67, dtype=x.dtype)[..., 3:],  # rows do not begin at multiples of 16 bytes
        torch.zeros(2, 100, 64, 3, dtype=x.dtype).transpose(2, 3),
        torch.zeros(2, 4, 100, 64, dtype=x.dtype)[:, :3].transpose(1, 2),  # heads and batch are not one axis
        torch.zeros(2, 1, 3, 64, dtype=x.dtype).expand(2, 100, 3, 64),
    ]
    for one in copied:
        assert gluon_impl.fetchable(one).is_contiguous()
        assert gluon_impl.fetchable(one) is not one
