"""The Triton kernels of proxy tokens on a CUDA device: what the interpreter and the CPU cannot do."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import attend_proxies, pool_tokens
from visparse_kernels.bits import identity_order
from visparse_kernels.proxies.api import attend_proxies_op, pool_tokens_op
from visparse_kernels.proxies.testing import BROKEN, check_proxies, plain_means, random_case
from visparse_kernels.testing import check_close, poisoned_memory

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HUGE = 2**31 // (8 * 128) + 4096  # tokens of 8 heads of 128: some offsets do not fit into 31 bits


def on_gpu(**options):
    return random_case(**({"length": 517, "n_proxies": 291, "block_q": 128, "head_group": [0, 1, -1, 0]} | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_q"), [(32, 128), (64, 192), (72, 64), (128, 128), (128, 192), (256, 64)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_error_rule(dtype, head_dim, block_q, shuffled) -> None:
    case = on_gpu(
        head_dim=head_dim, block_q=block_q, shuffled=shuffled, per_batch=shuffled, batch=2, dtype=dtype, device="cuda"
    )
    with poisoned_memory():
        out, lse = attend_proxies(*case.arguments(), impl="triton")
    check_proxies(out, lse, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_proxies", "hide"), [(1, 0.0), (15, 0.3), (64, 0.9), (600, 0.98), (2401, 0.995), (2400, 0.1)]
)
def test_error_rule_for_numbers_of_proxies(dtype, n_proxies, hide) -> None:
    case = on_gpu(length=300, n_proxies=n_proxies, hide=hide, dtype=dtype, device="cuda")
    with poisoned_memory():
        out, lse = attend_proxies(*case.arguments(), impl="triton")
    check_proxies(out, lse, case)


def test_no_group_at_all_leaves_every_head() -> None:
    case = on_gpu(head_group=[-1, -1], device="cuda")
    hidden = torch.empty(1, 0, *case.hidden.shape[2:], dtype=torch.int32, device="cuda")
    out, lse = attend_proxies(*replace(case, hidden=hidden).arguments(), impl="triton")
    torch.cuda.synchronize()
    assert torch.equal(out, case.out)
    assert torch.equal(lse, case.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(dtype, broken) -> None:
    case = on_gpu(length=300, n_proxies=80, dtype=dtype, device="cuda")
    out, lse = attend_proxies(*BROKEN[broken](case).arguments(), impl="triton")
    with pytest.raises(AssertionError, match="worst at"):
        check_proxies(out, lse, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("agent", [False, True])
def test_pooling(dtype, head_dim, agent) -> None:
    make = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 2, 330, 3, head_dim, generator=make) + 1).to("cuda", dtype)
    members = torch.randperm(330, generator=make)[:320].view(5, 64).to("cuda", torch.int32)
    members[1, 3:60] = -1
    query, scale = x[2] if agent else None, 0.05
    with poisoned_memory():
        *pooled, weight = pool_tokens(x[0], x[1], members, query=query, scale=scale, impl="triton")
    wanted, wanted_weight = plain_means(x[:2], members, None, query, scale, torch.float64)
    plain, _ = plain_means(x[:2], members, None, query, scale, torch.float32)
    check_close("pooled [x, b, p, h, d]", torch.stack(pooled), wanted, plain.to(dtype), dtype)
    torch.testing.assert_close(weight.double(), wanted_weight[:1, :1], atol=1e-6, rtol=1e-6)


def test_offsets_beyond_31_bits() -> None:
    make = torch.Generator(device="cuda").manual_seed(0)
    x = torch.empty(1, HUGE, 8, 128, dtype=torch.bfloat16, device="cuda").normal_(generator=make)
    y = torch.empty_like(x).normal_(generator=make)
    each = torch.arange(HUGE, dtype=torch.int32, device="cuda")[:, None]
    k, v, weight = pool_tokens(x, y, each, impl="triton")
    assert torch.equal(k, x)
    assert torch.equal(v, y)
    assert not weight.any()
    del k, v

    last = 512
    members = torch.arange(last, dtype=torch.int32, device="cuda").view(8, 64)
    pooled = pool_tokens(x, y, members + (HUGE - last), impl="triton")
    here = pool_tokens(x[:, -last:], y[:, -last:], members, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(pooled, here, strict=True))

    lse = torch.randn(1, 8, HUGE, generator=make, device="cuda")
    groups = torch.zeros(8, dtype=torch.int32, device="cuda")
    order = identity_order(HUGE, 128, "cuda")
    hidden = torch.zeros(1, 1, order.shape[1] // 128, 1, dtype=torch.int32, device="cuda")
    hidden[:, :, -1] = 5
    out, new_lse = attend_proxies(x, y, lse, *pooled, hidden, groups, order, 128, impl="triton")
    cut, short = slice(HUGE - last, HUGE), identity_order(last, 128, "cuda")
    part, part_lse = attend_proxies(
        x[:, cut], y[:, cut], lse[:, :, cut], *pooled, hidden[:, :, -4:], groups, short, 128, impl="triton"
    )
    assert torch.equal(out[:, cut], part)
    assert torch.equal(new_lse[:, :, cut], part_lse)
    assert not torch.equal(part, y[:, cut])


def test_the_same_call_gives_the_same_bits() -> None:
    case = on_gpu(head_dim=128, dtype=torch.bfloat16, device="cuda")
    first = attend_proxies(*case.arguments(), impl="triton")
    members = torch.arange(512, dtype=torch.int32, device="cuda").view(8, 64)
    pooled = pool_tokens(case.q, case.out, members, impl="triton")
    for _ in range(30):
        again = attend_proxies(*case.arguments(), impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        again = pool_tokens(case.q, case.out, members, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, pooled, strict=True))


@pytest.mark.parametrize("agent", [False, True])
def test_cuda_graph_replays_with_new_inputs(agent) -> None:
    case = on_gpu(n_proxies=8, dtype=torch.bfloat16, device="cuda")
    members = torch.arange(512, dtype=torch.int32, device="cuda").view(8, 64)
    tables = (case.hidden, case.head_group, case.q_order, case.block_q)

    def both():
        pooled = pool_tokens(case.q, case.out, members, query=case.q if agent else None, impl="triton")
        return attend_proxies(case.q, case.out, case.lse, *pooled, *tables, impl="triton")

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = both()
    case.q.normal_()
    case.hidden.bitwise_not_()
    graph.replay()
    wanted, wanted_lse = both()
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_opcheck() -> None:
    case = on_gpu(length=100, n_proxies=3, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(attend_proxies_op, (*case.arguments(), None, 0.125, "auto"))
    members = torch.arange(60, dtype=torch.int32, device="cuda").view(3, 20)
    torch.library.opcheck(pool_tokens_op, (case.q, case.out, members, None, None, None, 0.125, "auto"))


def test_memory_is_that_of_the_results() -> None:
    case = on_gpu(length=4000, dtype=torch.bfloat16, device="cuda")
    attend_proxies(*case.arguments(), impl="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_proxies(*case.arguments(), impl="triton")
    results = case.q.numel() * 2 + case.lse.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096
