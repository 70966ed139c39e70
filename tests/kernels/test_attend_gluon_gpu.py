"""The Hopper kernel on a GPU: the error rule, boxes of any origin, poisoned memory, repeatability, large offsets."""

import gc
from dataclasses import replace
from math import prod

import pytest
import torch

from visparse_kernels import BlockLists, attend, choose, explain, lists_from_map
from visparse_kernels.attend import gluon_impl, gluon_program
from visparse_kernels.testing import BROKEN, check_attend, poisoned_memory, random_lists
from visparse_kernels.testing_boxes import random_boxed_lists

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [(64, 128), (64, 192), (128, 128)]  # head_dim, block_q


@pytest.fixture(autouse=True)
def _hopper() -> None:
    why = gluon_impl.can_run(torch.device("cuda"), torch.bfloat16, 128, 128, 128)
    if why is not None:
        pytest.skip(why)


def check(lists: BlockLists, q, k, v, **options) -> None:
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="gluon", **options)
    check_attend(out, lse, q, k, v, lists, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
@pytest.mark.parametrize("partial", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [(1, 1), (130, 127), (517, 611), (1024, 1024), (1333, 2000)])
def test_error_rule_for_runs(dtype, head_dim, block_q, partial, lengths, make_qkv) -> None:
    lists = random_lists(
        q_len=lengths[0],
        k_len=lengths[1],
        block_q=block_q,
        block_k=128,
        head_group=[0, 1, -1, 0],
        keep=0.6,
        partial=partial,
        seed=lengths[0],
        device="cuda",
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    check(lists, q, k, v)


@pytest.mark.parametrize(
    ("grid", "before", "after"),
    [((4, 16, 24), 0, 0), ((5, 21, 27), 0, 0), ((3, 30, 19), 77, 0), ((7, 11, 16), 0, 300), ((1, 45, 50), 5, 130)],
)
@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
@pytest.mark.parametrize("k_box", [(2, 8, 8), (1, 8, 16), (4, 4, 8), (1, 1, 128)])
def test_error_rule_for_boxes(grid, before, after, head_dim, block_q, k_box, make_qkv) -> None:
    lists = random_boxed_lists(
        grid=grid,
        before=before,
        after=after,
        q_box=(block_q // 64, 8, 8) if grid[0] > 1 else (1, block_q // 8, 8),
        k_box=k_box,
        head_group=[0, 1, -1, 0],
        seed=sum(grid),
        device="cuda",
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    check(lists, q, k, v)


@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
def test_groups_with_boxes_of_their_own(head_dim, block_q, make_qkv) -> None:
    groups = block_q // 64
    lists = random_boxed_lists(
        grid=(6, 18, 20),
        before=3,
        after=40,
        q_box=[(groups, 8, 8), None, (1, groups * 4, 16)],
        k_box=[(2, 8, 8), None, (8, 4, 4)],
        head_group=[0, 1, 2, 1, -1, 0],
        device="cuda",
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    check(lists, q, k, v)


@pytest.mark.parametrize("partial", [0.0, 0.5])
@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
def test_groups_of_boxes_beside_groups_of_runs(head_dim, block_q, partial, make_qkv) -> None:
    """Unused rows of one kind read the first start of the next group, of the other kind; waiting for it would hang."""
    groups = block_q // 64
    lists = random_boxed_lists(
        grid=(6, 16, 24),
        q_box=[(groups, 8, 8), None, (1, groups * 4, 16)],
        k_box=[(2, 8, 8), None, (1, 8, 16)],
        head_group=[0, 1, 2, 1],
        partial=partial,
        device="cuda",
    )
    assert (lists.q_order.view(3, -1, block_q) < 0).all(2).any(1).tolist() == [True, True, False]
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    check(lists, q, k, v)


@pytest.mark.parametrize("seed", range(200))
def test_random_problems(seed, make_qkv) -> None:
    make = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=make))

    head_dim, block_q = SIZES[seed % 3]
    keep, partial = draw(5, 100) / 100, draw(0, 2) / 2
    head_group = [[0], [0, 1, 1], [0, -1, 1, 0]][draw(0, 2)]
    if seed % 2:
        grid = (draw(1, 7), draw(1, 30), draw(1, 40))
        q_boxes = [(block_q // 64, 8, 8), (1, block_q // 16, 16)]
        lists = random_boxed_lists(
            grid=grid,
            before=draw(0, 1) * draw(0, 200),
            after=draw(0, 1) * draw(0, 200),
            q_box=q_boxes[draw(0, 1)],
            k_box=[(2, 8, 8), (1, 8, 16), (1, 4, 32)][draw(0, 2)],
            head_group=head_group,
            keep=keep,
            partial=partial,
            seed=seed,
            device="cuda",
        )
    else:
        lists = random_lists(
            q_len=draw(1, 1500),
            k_len=draw(1, 1500),
            block_q=block_q,
            block_k=128,
            head_group=head_group,
            keep=keep,
            partial=partial,
            seed=seed,
            device="cuda",
        )
    dtype = DTYPES[draw(0, 1)]
    q, k, v = make_qkv(lists, batch=draw(1, 3), head_dim=head_dim, dtype=dtype, device="cuda", seed=seed)
    check(lists, q, k, v, scale=[None, 0.3][draw(0, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
def test_key_bias(dtype, shape, head_dim, block_q, make_qkv) -> None:
    lists = random_boxed_lists(
        grid=(4, 13, 20),
        after=33,
        q_box=(block_q // 64, 8, 8),
        k_box=[(2, 8, 8), (1, 8, 16)],
        head_group=[0, 1, 0],
        device="cuda",
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    bias = torch.randn(*shape, lists.k_len, generator=torch.Generator().manual_seed(0))
    bias[..., ::3] = -torch.inf
    bias[0, 0] = -torch.inf
    check(lists, q, k, v, key_bias=bias.cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(dtype, broken, make_qkv) -> None:
    lists = random_lists(
        q_len=600, k_len=633, block_q=128, block_k=128, head_group=[0, 1], keep=0.6, seed=2, device="cuda"
    )
    q, k, v = make_qkv(lists, head_dim=128, dtype=dtype, device="cuda")
    wrong, scale = BROKEN[broken](lists, 128**-0.5)
    out, lse = attend(q, k, v, wrong, scale=scale, return_lse=True, impl="gluon")
    with pytest.raises(AssertionError, match="worst at"):
        check_attend(out, lse, q, k, v, lists)


def test_nan_stays_where_it_is(make_qkv) -> None:
    mask = torch.rand(2, 400, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, :128] = False
    lists = BlockLists.from_mask(mask, 128, 128).to("cuda")
    q, k, v = make_qkv(lists, head_dim=128, dtype=torch.bfloat16, device="cuda")
    clean = attend(q, k, v, lists, impl="gluon")
    k[:, :128] = torch.nan
    v[:, :128] = torch.nan
    assert torch.equal(attend(q, k, v, lists, impl="gluon"), clean)
    q[0, 11, 1] = torch.nan
    out = attend(q, k, v, lists, impl="gluon")
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = clean[0, 11, 1]
    assert torch.equal(out, clean)


def test_an_empty_row_gives_zero_beside_nan(make_qkv) -> None:
    mask = torch.ones(1, 300, 300, dtype=torch.bool)
    mask[:, 128:256] = False
    lists = BlockLists.from_mask(mask, 128, 128).to("cuda")
    q, k, v = make_qkv(lists, head_dim=128, dtype=torch.bfloat16, device="cuda")
    k[:], v[:] = torch.nan, torch.nan
    out, lse = attend(q, k, v, lists, impl="gluon", return_lse=True)
    assert bool((out[:, 128:256] == 0).all())
    assert bool((lse[:, :, 128:256] == -torch.inf).all())


@pytest.mark.parametrize("batch", [1, 2])
def test_strides(batch, make_qkv) -> None:
    lists = random_boxed_lists(
        grid=(4, 13, 20), before=9, q_box=(2, 8, 8), k_box=(1, 8, 16), head_group=[0, 1, 1], device="cuda"
    )
    q, k, v = make_qkv(lists, batch=batch, head_dim=64, dtype=torch.bfloat16, device="cuda")
    wanted = attend(q, k, v, lists, impl="gluon")
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert gluon_impl.fetchable(heads_first) is heads_first
    fused = torch.zeros(batch, lists.k_len, 3, 3, 64, dtype=k.dtype, device="cuda")[:, :, 1].copy_(k)
    assert gluon_impl.fetchable(fused) is fused
    odd = torch.zeros(batch, lists.k_len, 3, 67, dtype=k.dtype, device="cuda")[..., 3:].copy_(v)
    dim_first = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for value in (v, odd, dim_first):
        assert torch.equal(attend(heads_first, fused, value, lists, impl="gluon"), wanted)


def test_the_same_call_gives_the_same_bits(make_qkv) -> None:
    lists = random_lists(q_len=4000, k_len=4000, block_q=128, block_k=128, head_group=[0, 1, 1], device="cuda")
    q, k, v = make_qkv(lists, head_dim=128, dtype=torch.bfloat16, device="cuda")
    first, first_lse = attend(q, k, v, lists, impl="gluon", return_lse=True)
    for _ in range(100):
        with poisoned_memory():
            out, lse = attend(q, k, v, lists, impl="gluon", return_lse=True)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_cuda_graph_replays_with_new_inputs(make_qkv) -> None:
    lists = random_lists(q_len=300, k_len=300, block_q=192, block_k=128, head_group=[0, 1], device="cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    attend(q, k, v, lists, impl="gluon")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, lists, impl="gluon")
    for seed in (7, 8):
        for x, new in zip((q, k, v), make_qkv(lists, dtype=torch.bfloat16, device="cuda", seed=seed), strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, attend(q, k, v, lists, impl="gluon"))


def test_auto_takes_it_and_shuffled_orders_go_elsewhere(make_qkv) -> None:
    options = dict(q_len=300, k_len=300, block_q=128, block_k=128, head_group=[0, 1], device="cuda")
    lists = random_lists(**options)
    q, k, v = make_qkv(lists, head_dim=128, dtype=torch.bfloat16, device="cuda")
    assert choose(q, lists) == "gluon"
    shuffled = random_lists(**options, shuffled=True)
    assert choose(q, shuffled) == "triton"
    name, usable, reason = explain(q, shuffled)[0]
    assert (name, usable) == ("gluon", False)
    assert "order is made of neither runs nor boxes" in reason
    with pytest.raises(ValueError, match="'gluon' cannot serve this case"):
        attend(q, k, v, shuffled, impl="gluon")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
@pytest.mark.parametrize("k_box", [(2, 8, 8), (1, 8, 16), (1, 2, 64)])
def test_fresh_lists_wait_for_nothing(k_box, head_dim, block_q, bias, make_qkv) -> None:
    tables = random_boxed_lists(
        grid=(5, 21, 27), before=9, after=300, q_box=(block_q // 64, 8, 8), k_box=k_box, head_group=[0], device="cuda"
    )
    heads = torch.tensor([0, 1, -1, 0], dtype=torch.int32, device="cuda")
    make = torch.Generator(device="cuda").manual_seed(0)

    def fresh(keep: float) -> BlockLists:
        kept = torch.rand(2, tables.n_q, tables.n_k, generator=make, device="cuda") < keep
        kept[:, ::4] = False
        return lists_from_map(
            kept,
            q_len=tables.q_len,
            k_len=tables.k_len,
            block_q=block_q,
            block_k=128,
            q_order=tables.q_order,
            k_order=tables.k_order,
            head_group=heads,
            boxes=tables.boxes,
            capacity=tables.n_k - 1,
        )

    first = fresh(0.5)
    q, k, v = make_qkv(first, batch=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    options = {"return_lse": True, "key_bias": torch.randn(2, 4, first.k_len, device="cuda") if bias else None}
    attend(q, k, v, first, impl="gluon", **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lists = [fresh(keep) for keep in (0.0, 0.1, 0.6, 0.95)]
        results = [attend(q, k, v, one, **options) for one in lists]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert choose(q, lists[0]) == "gluon"
    for one, (out, lse) in zip(lists, results, strict=True):
        check_attend(out, lse, q, k, v, one, key_bias=options["key_bias"])
        wanted, wanted_lse = attend(q, k, v, one, impl="triton", **options)
        torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-3)


def test_fresh_lists_leave_no_memory(make_qkv) -> None:
    tables = random_boxed_lists(
        grid=(5, 21, 27), after=40, q_box=(2, 8, 8), k_box=(2, 8, 8), head_group=[0], device="cuda"
    )
    inputs = make_qkv(tables, head_dim=128, dtype=torch.bfloat16, device="cuda")
    gc.collect()
    sizes = []
    for seed in range(101):
        make = torch.Generator(device="cuda").manual_seed(seed)
        lists = lists_from_map(
            torch.rand(1, tables.n_q, tables.n_k, generator=make, device="cuda") < 0.4,
            q_len=tables.q_len,
            k_len=tables.k_len,
            block_q=128,
            block_k=128,
            q_order=tables.q_order,
            k_order=tables.k_order,
            head_group=tables.head_group,
            boxes=tables.boxes,
        )
        attend(*inputs, lists, impl="gluon")
        del lists
        sizes.append((torch.cuda.memory_allocated(), len(gluon_program._full_programs), len(gluon_program._programs)))
    assert set(sizes[1:]) == {sizes[0]}


@pytest.mark.parametrize("boxed", [False, True])
def test_offsets_beyond_two_to_the_31(boxed) -> None:
    heads, head_dim, grid = 120, 128, (10, 100, 142)
    length = prod(grid)
    if boxed:
        lists = random_boxed_lists(
            grid=grid, q_box=(2, 8, 8), k_box=(1, 8, 16), head_group=[0] * heads, keep=0.002, validate=False
        )
    else:
        n_q = -(-length // 128)
        rows = torch.arange(n_q).repeat_interleave(2)
        lists = BlockLists.from_entries(
            q_len=length,
            k_len=length,
            block_q=128,
            block_k=128,
            head_group=torch.zeros(heads, dtype=torch.int32),
            q_order=None,
            k_order=None,
            rows=rows,
            cols=torch.tensor([0, n_q - 1]).repeat(n_q),
            tile=torch.full_like(rows, -1),
        )
    lists = lists.to("cuda")
    q, k, v = (torch.randn(1, length, heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() > 2**31
    out, lse = attend(q, k, v, lists, impl="gluon", return_lse=True)
    few = replace(lists, head_group=lists.head_group[:2].clone())
    small = [x[:, :, -2:].contiguous() for x in (q, k, v)]
    wanted, wanted_lse = attend(*small, few, impl="triton", return_lse=True)
    torch.testing.assert_close(out[:, :, -2:], wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse[:, -2:], wanted_lse, atol=1e-3, rtol=1e-3)
