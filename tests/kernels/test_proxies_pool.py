"""`pool_tokens` against its definition: every implementation that runs here, in the interpreter and on a GPU too."""

import math

import pytest
import torch

from visparse_kernels.proxies import triton_impl
from visparse_kernels.proxies.api import pool_tokens
from visparse_kernels.proxies.testing import plain_means
from visparse_kernels.testing import check_close, poisoned_memory

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
if triton_impl.cannot_pool(torch.device("cpu"), torch.float32) is None:  # in Triton's interpreter
    IMPLS = [pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter)]

everywhere = pytest.mark.parametrize(("impl", "device"), IMPLS)


def draw(n_proxies=7, size=6, *, batch=2, heads=3, head_dim=32, dtype=torch.float32, device="cpu"):
    """Draw keys, values and queries, and scattered members: some proxies are smaller than others."""
    make = torch.Generator().manual_seed(0)
    length = n_proxies * size + 3
    x = torch.randn(3, batch, length, heads, head_dim, generator=make) + 1
    members = torch.randperm(length, generator=make)[: n_proxies * size].view(n_proxies, size).to(torch.int32)
    fewer = torch.rand(n_proxies, size, generator=make) < 0.3
    fewer[:, size // 2] = False
    members = members.masked_fill(fewer, -1)
    return x.to(device, dtype), members.to(device)


def bias_of_shape(shape, length, device):
    bias = torch.randn(*shape, length, generator=torch.Generator().manual_seed(1))
    bias[..., ::4] = -torch.inf
    return bias.to(device)


def check(result, x, members, *, key_bias=None, query=None, scale=None):
    pooled_k, pooled_v, weight = result
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    wanted, wanted_weight = plain_means(x, members, key_bias, query, scale, torch.float64)
    plain, _ = plain_means(x, members, key_bias, query, scale, torch.float32)  # sums in fp32, rounded once
    check_close("pooled [x, b, p, h, d]", torch.stack([pooled_k, pooled_v]), wanted, plain.to(x.dtype), x.dtype)
    axes = (1, 1) if key_bias is None else key_bias.shape[:2]
    assert weight.shape == (*axes, members.shape[0])
    assert weight.dtype == torch.promote_types(x.dtype, torch.float32)
    wanted_weight = wanted_weight[: axes[0], : axes[1]]
    torch.testing.assert_close(weight.double(), wanted_weight, atol=1e-6, rtol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n_proxies", "size", "head_dim"), [(7, 6, 32), (3, 64, 128), (2, 70, 72), (5, 1, 8), (1, 3, 256)]
)
def test_means(impl, device, dtype, n_proxies, size, head_dim) -> None:
    x, members = draw(n_proxies, size, head_dim=head_dim, dtype=dtype, device=device)
    with poisoned_memory():
        result = pool_tokens(x[0], x[1], members, impl=impl)
    check(result, x[:2], members)


@everywhere
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("agent", [False, True])
def test_key_bias(impl, device, shape, agent) -> None:
    x, members = draw(device=device)
    bias = bias_of_shape(shape, x.shape[2], device)
    bias[..., members[2][members[2] >= 0].long()] = -torch.inf
    query = x[2] if agent else None
    with poisoned_memory():
        result = pool_tokens(x[0], x[1], members, key_bias=bias, query=query, scale=0.1, impl=impl)
    check(result, x[:2], members, key_bias=bias, query=query, scale=0.1)
    assert not result[0][:, 2].any()
    assert not result[1][:, 2].any()
    assert (result[2][..., 2] == -torch.inf).all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agents(impl, device, dtype) -> None:
    x, members = draw(dtype=dtype, device=device)
    result = pool_tokens(x[0], x[1], members, query=x[2], impl=impl)
    check(result, x[:2], members, query=x[2])
    mean = pool_tokens(x[0], x[1], members, impl=impl)
    assert (result[0] - mean[0]).abs().max() > 0.1
    assert torch.equal(result[2], mean[2])


@everywhere
@pytest.mark.parametrize("agent", [False, True])
def test_equal_tokens_give_themselves(impl, device, agent) -> None:
    x, members = draw(device=device)
    x[:] = x[:, :, :1]
    pooled_k, pooled_v, weight = pool_tokens(x[0], x[1], members, query=x[2] if agent else None, impl=impl)
    torch.testing.assert_close(pooled_k, x[0][:, :7])
    torch.testing.assert_close(pooled_v, x[1][:, :7])
    torch.testing.assert_close(weight[0, 0], (members >= 0).sum(1).float().log())


@everywhere
def test_counts(impl, device) -> None:
    x, members = draw(4, 1, device=device)
    counts = torch.tensor([16, 1, 7, 64], dtype=torch.int32, device=device)
    pooled_k, _, weight = pool_tokens(x[0], x[1], members, counts=counts, impl=impl)
    assert torch.equal(pooled_k, x[0][:, members[:, 0].long()])
    torch.testing.assert_close(weight, counts.float().log()[None, None])
    bias = torch.full((1, 1, x.shape[2]), math.log(2), device=device)
    _, _, weight = pool_tokens(x[0], x[1], members, counts=counts, key_bias=bias, impl=impl)
    torch.testing.assert_close(weight, (2 * counts).float().log()[None, None])


@everywhere
@pytest.mark.parametrize("agent", [False, True])
def test_hidden_members_and_other_tokens_never_leak(impl, device, agent) -> None:
    x, members = draw(device=device)
    length = x.shape[2]
    bias = torch.zeros(1, 1, length, device=device)
    bias[..., members[:, 3].clamp(min=0).long()] = -torch.inf
    outside = torch.ones(length, dtype=torch.bool, device=device)
    outside[members[members >= 0].long()] = False
    query = x[2] if agent else None
    wanted = pool_tokens(x[0], x[1], members, key_bias=bias, query=query, impl=impl)
    x[:, :, outside | (bias[0, 0] == -torch.inf)] = torch.nan
    for got, clean in zip(pool_tokens(x[0], x[1], members, key_bias=bias, query=query, impl=impl), wanted, strict=True):
        assert torch.equal(got, clean)


@everywhere
def test_strides(impl, device) -> None:
    x, members = draw(device=device)
    wanted = pool_tokens(x[0], x[1], members, impl=impl)
    heads_first = x[0].transpose(1, 2).contiguous().transpose(1, 2)
    dim_first = x[1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    table = torch.stack([members] * 2, -1)[..., 0]
    got = pool_tokens(heads_first, dim_first, table, impl=impl)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_means_in_fp64_and_bf16() -> None:
    for dtype, impl in ((torch.float64, "reference"), (torch.bfloat16, "cpu"), (torch.bfloat16, "reference")):
        x, members = draw(3, 64, dtype=dtype)
        check(pool_tokens(x[0], x[1], members, impl=impl), x[:2], members)
