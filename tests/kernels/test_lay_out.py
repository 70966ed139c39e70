"""`lay_out` against its definition: every implementation that runs here, in the interpreter and on a GPU too."""

import pytest
import torch

from visparse_kernels.lay_out import triton_impl
from visparse_kernels.lay_out.api import lay_out
from visparse_kernels.testing import check_close, poisoned_memory

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
if triton_impl.can_run(torch.device("cpu"), torch.float32, 192, 128) is None:  # in Triton's interpreter
    IMPLS = [pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter)]

everywhere = pytest.mark.parametrize(("impl", "device"), IMPLS)


def order_of(length, block, make, spare=0):
    """Draw an order with padding at the ends of its last blocks, int32 [slots]."""
    slots = -(-length // block) * block + spare * block
    order = torch.full((slots,), -1, dtype=torch.int32)
    order[: length - 1] = torch.randperm(length - 1, generator=make).to(torch.int32)
    order[-block] = length - 1  # a block of one token, as a class token has it
    return order


def draw(length=150, *, batch=2, heads=3, head_dim=32, blocks=(48, 32), dtype=torch.float32, device="cpu"):
    make = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, length, 3, heads, head_dim, generator=make).to(device, dtype) + 1
    orders = [order_of(length, block, make, spare=1).to(device) for block in blocks]
    return packed.unbind(2), orders


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("parts", "pool"), [(0, 0), (8, 2), (1, 4), (4, 0), (0, 2)])
def test_rows_and_means(impl, device, dtype, parts, pool) -> None:
    (q, k, v), (q_order, k_order) = draw(dtype=dtype, device=device)
    with poisoned_memory():
        made = lay_out(q, k, v, q_order, k_order, 48, 32, parts=parts, pool=pool, impl=impl)
    for x, order, rows in ((q, q_order, made.q), (k, k_order, made.k), (v, k_order, made.v)):
        assert torch.equal(rows, x[:, order[order >= 0].long()])
        assert rows.transpose(1, 2).is_contiguous()
    if parts:
        for x, order, size, got in ((q, q_order, 48, made.q_mean), (k, k_order, 32 // parts, made.k_mean)):
            check_close("mean", got, *(mean(x, order, size, to).transpose(1, 2) for to in WIDTHS), torch.float32)
    if pool:
        for x, got in ((k, made.pooled_k), (v, made.pooled_v)):
            wanted, plain = (mean(x, k_order, 32 // pool, to) for to in WIDTHS)
            assert got.dtype == dtype
            check_close("pooled", got, wanted, plain.to(dtype), dtype)
    assert [x is None for x in made[3:]] == [not parts] * 2 + [not pool] * 2


WIDTHS = (torch.float64, torch.float32)


def mean(x, order, size, dtype):
    """Means of runs of slots, a run at a time, [B, runs, H, D]; 0 of no token."""
    runs = [run[run >= 0].long() for run in order.view(-1, size)]
    return torch.stack([x[:, run].to(dtype).sum(1) / max(len(run), 1) for run in runs], 1)


@everywhere
@pytest.mark.parametrize(("head_dim", "blocks"), [(64, (192, 128)), (128, (128, 128)), (72, (64, 64)), (8, (16, 16))])
def test_sizes(impl, device, head_dim, blocks) -> None:
    (q, k, v), orders = draw(401, head_dim=head_dim, blocks=blocks, batch=1, heads=2, device=device)
    with poisoned_memory():
        made = lay_out(q, k, v, *orders, *blocks, parts=4, pool=2, impl=impl)
    wanted = lay_out(q, k, v, *orders, *blocks, parts=4, pool=2, impl="reference")
    for name, got, plain in zip(made._fields, made, wanted, strict=True):
        torch.testing.assert_close(got, plain, atol=2e-6, rtol=2e-6, msg=name)


@everywhere
def test_what_is_not_finite_stays_where_it_is(impl, device) -> None:
    (q, k, v), orders = draw(device=device)
    k = k.clone()
    k[0, 5] = torch.nan
    made = lay_out(q, k, v, *orders, 48, 32, parts=2, pool=1, impl=impl)
    assert int(made.k.isnan().any(-1).any(-1).sum()) == 1
    assert int(made.k_mean.isnan().any(-1).sum()) == 3  # one part of one block, for each head
    assert int(made.pooled_k.isnan().any(-1).sum()) == 3
    assert not made.pooled_v.isnan().any()


@everywhere
def test_any_strides(impl, device) -> None:
    (q, k, v), orders = draw(device=device)
    wanted = lay_out(q.contiguous(), k.contiguous(), v.contiguous(), *orders, 48, 32, parts=2, pool=2, impl=impl)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for x in (heads_first, last):
        for got, plain in zip(lay_out(*x, *orders, 48, 32, parts=2, pool=2, impl=impl), wanted, strict=True):
            assert torch.equal(got, plain)


GOOD, ORDERS = draw()
BAD = [
    ({"impl": "fast"}, ValueError, r"impl: wanted one of auto, triton, reference, got 'fast'"),
    ({"impl": "triton", "q_order": ORDERS[0][:-24], "block_q": 24}, ValueError, r"impl: 'triton' cannot serve"),
    ({"q": GOOD[0][0]}, ValueError, r"q: wanted \[batch, tokens, heads, head_dim\]"),
    ({"q": GOOD[0].int()}, TypeError, r"q: wanted fp16, bf16, fp32 or fp64, got torch.int32"),
    ({"k": GOOD[1][:, :9]}, ValueError, r"k: wanted the shape of q"),
    ({"v": GOOD[2].half()}, TypeError, r"v: wanted torch.float32 as q has"),
    ({"q_order": ORDERS[0].long()}, TypeError, r"q_order: wanted an int32 tensor"),
    ({"k_order": ORDERS[1][:-1]}, ValueError, r"k_order: wanted \[blocks \* 32\] slots that hold 150 tokens"),
    ({"parts": 3}, ValueError, r"parts: wanted 0 or a divisor of block_k = 32, got 3"),
    ({"pool": -1}, ValueError, r"pool: wanted 0 or a divisor"),
    ({"v": GOOD[2].to("meta")}, ValueError, r"v: wanted the device of q, cpu, got meta"),
    ({"q": GOOD[0].clone().requires_grad_()}, ValueError, r"q: .* lay_out is for inference only"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_error_texts(change, error, text) -> None:
    arguments = dict(zip(("q", "k", "v"), GOOD, strict=True)) | {"q_order": ORDERS[0], "k_order": ORDERS[1]}
    with pytest.raises(error, match=text):
        lay_out(**{**arguments, "block_q": 48, "block_k": 32, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_at_the_size_of_a_model(dtype) -> None:
    (q, k, v), orders = draw(5477, batch=4, heads=6, head_dim=64, blocks=(192, 128), dtype=dtype, device="cuda")
    with poisoned_memory():
        made = lay_out(q, k, v, *orders, 192, 128, parts=8, pool=2)
    wanted = lay_out(q.float(), k.float(), v.float(), *orders, 192, 128, parts=8, pool=2, impl="reference")
    for name, got, plain in zip(made._fields, made, wanted, strict=True):
        torch.testing.assert_close(got.float(), plain.to(got.dtype).float(), atol=1e-5, rtol=1e-2, msg=name)
    for x, order, rows in ((q, orders[0], made.q), (v, orders[1], made.v)):
        assert torch.equal(rows, x[:, order[order >= 0].long()])
