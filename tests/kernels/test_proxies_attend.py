"""`attend_proxies` against its definition: every implementation that runs here, in the interpreter and on a GPU too."""

from dataclasses import fields, replace

import pytest
import torch

from visparse_kernels import BlockLists, attend
from visparse_kernels.bits import pack_bits
from visparse_kernels.proxies import triton_impl
from visparse_kernels.proxies.api import attend_proxies, pool_tokens
from visparse_kernels.proxies.testing import BROKEN, check_proxies, random_case
from visparse_kernels.testing import check_attend, check_close, eager, poisoned_memory

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
if triton_impl.cannot_pool(torch.device("cpu"), torch.float32) is None:  # in Triton's interpreter
    IMPLS = [pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter)]

everywhere = pytest.mark.parametrize(("impl", "device"), IMPLS)

CASES = {
    "odd": {"length": 61, "n_proxies": 67, "block_q": 16, "head_group": [0, 1, -1], "batch": 2},
    "orders": {"length": 50, "n_proxies": 200, "block_q": 32, "head_group": [1, 0], "shuffled": True},
    "rows of their own": {
        "length": 40,
        "n_proxies": 96,
        "block_q": 16,
        "head_group": [0, 1, 0],
        "batch": 2,
        "per_batch": True,
        "shuffled": True,
    },
    "parts of query blocks": {"length": 100, "n_proxies": 70, "block_q": 48, "head_group": [0, 0]},
    "runs of chunks": {"length": 64, "n_proxies": 300, "block_q": 32, "head_group": [0], "hide": 0.97},
    "whole chunks": {"length": 32, "n_proxies": 128, "block_q": 16, "head_group": [0, 0], "hide": 0.0},
    "few": {"length": 33, "n_proxies": 5, "block_q": 16, "head_group": [0, -1]},
    "one": {"length": 1, "n_proxies": 1, "block_q": 16, "head_group": [0], "hide": 0.0},
    "all hidden": {"length": 40, "n_proxies": 45, "block_q": 16, "head_group": [0], "hide": 1.1},
    "all skipped": {"length": 20, "n_proxies": 7, "block_q": 16, "head_group": [-1, -1]},
}


def run(case, impl, **options):
    return attend_proxies(*case.arguments(), impl=impl, **options)


@everywhere
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_rule(impl, device, case, dtype) -> None:
    case = random_case(**CASES[case], dtype=dtype, device=device, seed=3)
    with poisoned_memory():
        out, lse = run(case, impl)
    check_proxies(out, lse, case)


@everywhere
@pytest.mark.parametrize("head_dim", [8, 32, 72, 128, 256])
def test_error_rule_for_head_sizes(impl, device, head_dim) -> None:
    case = random_case(
        length=40, n_proxies=90, block_q=16, head_group=[0, 1], head_dim=head_dim, shuffled=True, device=device
    )
    with poisoned_memory():
        out, lse = run(case, impl, scale=0.2)
    check_proxies(out, lse, case, 0.2)


def test_error_rule_in_fp64() -> None:
    case = random_case(
        length=61, n_proxies=67, block_q=16, head_group=[0, 1], dtype=torch.float64, shuffled=True, batch=2
    )
    check_proxies(*run(case, "reference"), case)


def test_error_rule_in_bf16_on_the_cpu() -> None:
    case = random_case(length=61, n_proxies=67, block_q=16, head_group=[0, 1], dtype=torch.bfloat16, batch=2)
    check_proxies(*run(case, "cpu"), case)


@everywhere
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(impl, device, broken) -> None:
    case = random_case(length=64, n_proxies=80, block_q=16, head_group=[0, 1], dtype=torch.float16, device=device)
    out, lse = run(BROKEN[broken](case), impl)
    with pytest.raises(AssertionError, match="worst at"):
        check_proxies(out, lse, case)


@everywhere
def test_what_sees_no_proxy_keeps_its_bits(impl, device) -> None:
    case = random_case(length=61, n_proxies=67, block_q=16, head_group=[0, 1, -1], hide=1.1, device=device)
    out, lse = run(case, impl)
    assert torch.equal(out, case.out)
    assert torch.equal(lse, case.lse)
    assert out.data_ptr() != case.out.data_ptr()
    assert (lse == -torch.inf).any()
    assert not out.transpose(1, 2)[lse == -torch.inf].any()


@everywhere
@pytest.mark.parametrize("head_group", [[0, 1, -1], [-1, -1, -1]])
def test_results_go_to_other_places(impl, device, head_group) -> None:
    case = random_case(length=61, n_proxies=67, block_q=16, head_group=head_group, batch=2, device=device)
    if max(head_group) < 0:
        case = replace(case, hidden=case.hidden[:, :0])
    place = torch.randperm(61, generator=torch.Generator().manual_seed(5)).to(device)
    order = case.q_order[:1]
    moved = torch.where(order < 0, -1, place[order.clamp(min=0).long()]).to(torch.int32)
    wanted, wanted_lse = run(replace(case, q_order=order), impl)
    with poisoned_memory():
        out, lse = run(replace(case, q_order=order), impl, out_order=moved)
    assert torch.equal(out[:, place], wanted)
    assert torch.equal(lse[:, :, place], wanted_lse)
    assert out.is_contiguous()


@everywhere
def test_no_group_at_all_leaves_every_head(impl, device) -> None:
    case = random_case(length=20, n_proxies=7, block_q=16, head_group=[-1, -1], device=device)
    out, lse = run(replace(case, hidden=case.hidden[:, :0]), impl)
    assert torch.equal(out, case.out)
    assert torch.equal(lse, case.lse)
    assert out.data_ptr() != case.out.data_ptr()


@everywhere
@pytest.mark.parametrize("place", [0, 31, 32, 63, 64, 127, 129])
def test_one_visible_proxy(impl, device, place) -> None:
    case = random_case(length=20, n_proxies=130, block_q=16, head_group=[0, 0], device=device)
    bits = torch.ones(1, 1, 2, 160, dtype=torch.bool)
    bits[..., place] = False
    case = replace(case, hidden=pack_bits(bits).to(device), weight=torch.full_like(case.weight, 2.0))
    out, lse = run(case, impl)
    assert (lse > case.lse).all()
    check_proxies(out, lse, case)


@everywhere
def test_arguments_are_not_changed(impl, device) -> None:
    case = random_case(length=61, n_proxies=67, block_q=16, head_group=[0, 1], device=device)
    before = {field.name: getattr(case, field.name) for field in fields(case) if field.name != "block_q"}
    before = {name: x.clone() for name, x in before.items()}
    run(case, impl)
    assert all(torch.equal(getattr(case, name), x) for name, x in before.items())


@everywhere
@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
def test_a_padding_slot_reads_and_writes_nothing_of_others(impl, device, garbage) -> None:
    """Rows outside of the views hold garbage, and token 0, which padding may borrow, is garbage in itself only."""
    case = random_case(length=41, n_proxies=37, block_q=16, head_group=[0, 1], shuffled=True, device=device)
    wanted, wanted_lse = run(case, impl)

    def inside(x):
        rows = torch.full_like(x[:, :1], garbage)
        return torch.cat([rows, x, rows], 1)[:, 1:-1]

    q, k, v, out = map(inside, (case.q, case.pooled_k, case.pooled_v, case.out))
    result, lse = run(replace(case, q=q, pooled_k=k, pooled_v=v, out=out), impl)
    assert torch.equal(result, wanted)
    assert torch.equal(lse, wanted_lse)
    q = q.clone()
    q[:, 0] = torch.nan
    result, lse = run(replace(case, q=q), impl)
    assert torch.equal(result[:, 1:], wanted[:, 1:])
    assert torch.equal(lse[:, :, 1:], wanted_lse[:, :, 1:])
    touched = (case.shown()[:, :, 0] & (case.weight > -torch.inf)).any(-1)
    assert touched.any()
    assert result[:, 0][touched].isnan().all()  # NaN stays visible where it belongs
    assert lse[:, :, 0][touched].isnan().all()


@everywhere
def test_strides(impl, device) -> None:
    case = random_case(length=40, n_proxies=37, block_q=16, head_group=[0, 1], batch=2, per_batch=True, device=device)
    wanted, wanted_lse = run(case, impl)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def dim_first(x):
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    def sliced(x):
        return torch.zeros(*x.shape[:-1], x.shape[-1] + 16, dtype=x.dtype, device=x.device)[..., 8:-8].copy_(x)

    other = replace(
        case,
        q=heads_first(case.q),
        out=sliced(case.out),
        lse=case.lse.transpose(1, 2).contiguous().transpose(1, 2),
        pooled_k=dim_first(case.pooled_k),
        pooled_v=sliced(case.pooled_v),
        weight=torch.stack([case.weight] * 2, -1)[..., 0],
        hidden=torch.stack([case.hidden] * 2, -1)[..., 0],
    )
    out, lse = run(other, impl)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-6, rtol=1e-6)
    assert out.is_contiguous()
    assert lse.is_contiguous()


def tiled(impl, device, *, equal: bool, keep: float, seed: int = 0):
    """Attend exactly to some tiles of 16 tokens, and to the proxies of the others; return the case and the result."""
    make = torch.Generator().manual_seed(seed)
    length, tile, heads = 150, 16, 2
    n_tiles = -(-length // tile)
    q = torch.randn(2, length, heads, 32, generator=make).to(device)
    k, v = torch.randn(2, 2, n_tiles if equal else length, heads, 32, generator=make).to(device)
    members = torch.arange(n_tiles * tile, dtype=torch.int32, device=device).view(-1, tile)
    members = torch.where(members < length, members, -1)
    if equal:
        k, v = (x.repeat_interleave(tile, 1)[:, :length] for x in (k, v))
    block_q = 32
    n_q = -(-length // block_q)
    kept = torch.rand(heads, n_q, n_tiles, generator=make) < keep
    mask = kept.repeat_interleave(block_q, 1)[:, :length].repeat_interleave(tile, 2)[:, :, :length]
    lists = BlockLists.from_mask(mask, block_q, 32).to(device)
    out, lse = attend(q, k, v, lists, return_lse=True, impl="reference")
    bits = torch.zeros(1, heads, n_q, -(-n_tiles // 32) * 32, dtype=torch.bool)
    bits[0, :, :, :n_tiles] = kept
    pooled = pool_tokens(k, v, members, impl=impl)
    groups = torch.arange(heads, dtype=torch.int32, device=device)
    hidden = pack_bits(bits).to(device)
    result = attend_proxies(q, out, lse, *pooled, hidden, groups, lists.q_order[:1], block_q, impl=impl)
    return (q, k, v), lists, (out, lse), result


@everywhere
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.7])
def test_equal_tokens_in_every_tile_give_dense_attention(impl, device, keep) -> None:
    (q, k, v), _, _, (out, lse) = tiled(impl, device, equal=True, keep=keep)
    every = torch.ones(2, 150, 150, dtype=torch.bool, device=device)
    wanted, wanted_lse = eager(q.double(), k.double(), v.double(), every, 32**-0.5)
    plain, plain_lse = eager(q, k, v, every, 32**-0.5)
    check_close("out [b, s, h, d]", out, wanted, plain, q.dtype)
    check_close("lse [b, h, s]", lse, wanted_lse, plain_lse, q.dtype)


@everywhere
def test_all_tiles_exact_give_dense_attention(impl, device) -> None:
    (q, k, v), lists, exact, (out, lse) = tiled(impl, device, equal=False, keep=1.1)
    assert torch.equal(out, exact[0])
    assert torch.equal(lse, exact[1])
    check_attend(out, lse, q, k, v, lists)
    assert lists.density == 1.0
