"""The CPU implementation and the reference: the error rule, and cases that can be computed by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from visparse_kernels import BlockLists, attend
from visparse_kernels.testing import BROKEN, check_attend, poisoned_memory, random_lists

SHAPES = {
    "one": {"q_len": 1, "k_len": 1, "block_q": 16, "block_k": 32, "head_group": [0], "keep": 1.0, "partial": 0.0},
    "odd": {"q_len": 127, "k_len": 129, "block_q": 32, "block_k": 32, "head_group": [0, 1, -1]},
    "prime": {"q_len": 251, "k_len": 251, "block_q": 64, "block_k": 64, "head_group": [1, 0, 1]},
    "short keys": {"q_len": 200, "k_len": 17, "block_q": 128, "block_k": 64, "head_group": [0, 0]},
    "orders": {"q_len": 150, "k_len": 170, "block_q": 32, "block_k": 64, "head_group": [0, 1, 0, -1], "shuffled": True},
    "block 96": {"q_len": 200, "k_len": 300, "block_q": 96, "block_k": 96, "head_group": [0, 1], "shuffled": True},
    "all full": {"q_len": 100, "k_len": 100, "block_q": 32, "block_k": 32, "head_group": [0], "partial": 0.0},
    "all full, shuffled": {
        "q_len": 190,
        "k_len": 150,
        "block_q": 48,
        "block_k": 32,
        "head_group": [2, 0, -1, 1],
        "partial": 0.0,
        "shuffled": True,
    },
    "nearly nothing": {
        "q_len": 200,
        "k_len": 190,
        "block_q": 32,
        "block_k": 32,
        "head_group": [1, 0],
        "keep": 0.1,
        "partial": 0.0,
    },
    "all masked": {"q_len": 100, "k_len": 100, "block_q": 32, "block_k": 32, "head_group": [0, 1], "partial": 1.0},
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule(shape, impl, make_qkv) -> None:
    lists = random_lists(**SHAPES[shape], seed=5)
    q, k, v = make_qkv(lists, batch=2, head_dim=64)
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl=impl)
    check_attend(out, lse, q, k, v, lists)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 72, 128, 256])
def test_error_rule_for_dtypes_and_head_sizes(dtype, head_dim, make_qkv) -> None:
    lists = random_lists(q_len=90, k_len=110, block_q=32, block_k=32, head_group=[0, 1], shuffled=True)
    q, k, v = make_qkv(lists, head_dim=head_dim, dtype=dtype)
    out, lse = attend(q, k, v, lists, return_lse=True, impl="cpu", scale=0.11)
    check_attend(out, lse, q, k, v, lists, scale=0.11)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("seed", range(40))
def test_error_rule_on_random_cases(seed, make_qkv) -> None:
    draw = torch.Generator().manual_seed(seed)
    q_len, k_len, block_q, words, heads = (
        int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 160), (1, 160), (8, 70), (1, 4), (1, 5))
    )
    head_group = torch.randint(-1, 3, (heads,), generator=draw).tolist()
    if max(head_group) < 0:
        head_group[0] = 0
    lists = random_lists(
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=32 * words,
        head_group=head_group,
        keep=float(torch.rand((), generator=draw)),
        shuffled=seed % 2 == 0,
        seed=seed,
    )
    q, k, v = make_qkv(lists, batch=1 + seed % 2, head_dim=16, seed=seed)
    bias = None
    if seed % 3 == 0:
        bias = torch.randn(1, heads, k_len, generator=draw)
        bias[torch.rand(bias.shape, generator=draw) < 0.3] = -torch.inf
    out, lse = attend(q, k, v, lists, key_bias=bias, return_lse=True, impl="cpu")
    check_attend(out, lse, q, k, v, lists, key_bias=bias)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(broken, make_qkv) -> None:
    lists = random_lists(q_len=150, k_len=170, block_q=32, block_k=32, head_group=[0, 1], keep=0.6, seed=2)
    q, k, v = make_qkv(lists)
    wrong, scale = BROKEN[broken](lists, 64**-0.5)
    out, lse = attend(q, k, v, wrong, scale=scale, return_lse=True, impl="cpu")
    with pytest.raises(AssertionError, match=r"out \[b, s, h, d\]: worst at .* error .* allowed"):
        check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_dense_lists_equal_dense_attention(impl, make_qkv) -> None:
    lists = BlockLists.dense(q_len=130, k_len=75, heads=3, block_q=64, block_k=32)
    q, k, v = make_qkv(lists, batch=2)
    out = attend(q, k, v, lists, impl=impl)
    wanted = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert (out - wanted).abs().max() < 2e-6


def test_an_empty_table_of_tiles_may_have_any_strides(make_qkv) -> None:
    lists = BlockLists.dense(q_len=70, k_len=70, heads=2, block_q=64, block_k=32, device="cpu")
    odd = replace(lists, tiles=torch.empty_strided((0, 64, 1), (1, 0, 0), dtype=torch.int32))
    q, k, v = make_qkv(lists)
    assert torch.equal(attend(q, k, v, odd, impl="cpu"), attend(q, k, v, lists, impl="cpu"))


def test_full_blocks_and_masks_of_ones_agree(make_qkv) -> None:
    full = BlockLists.dense(q_len=96, k_len=80, heads=2, block_q=32, block_k=32)
    nothing, everything = torch.zeros_like(full.full_offsets), torch.full((1, 32, 1), -1, dtype=torch.int32)
    masked = replace(
        full,
        full_offsets=nothing,
        full_indices=full.full_indices[:0],
        partial_offsets=full.full_offsets,
        partial_indices=full.full_indices,
        partial_tiles=torch.zeros_like(full.full_indices),
        tiles=everything,
    )
    q, k, v = make_qkv(full)
    assert torch.equal(attend(q, k, v, full, impl="cpu"), attend(q, k, v, masked, impl="cpu"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_one_hot_values_read_the_mask_back(impl) -> None:
    lists = random_lists(q_len=50, k_len=64, block_q=16, block_k=32, head_group=[0, 1], shuffled=True, seed=9)
    q, k = torch.zeros(1, 50, 2, 64), torch.zeros(1, 64, 2, 64)
    v = torch.eye(64)[None, :, None].expand(1, 64, 2, 64)
    out, lse = attend(q, k, v, lists, return_lse=True, impl=impl)
    assert torch.equal(out[0].transpose(0, 1) > 0, lists.to_mask())
    assert torch.allclose(lse[0].exp(), lists.to_mask().sum(-1).float())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_query_that_sees_nothing_gives_zero_and_minus_infinity(impl, make_qkv) -> None:
    mask = torch.rand(2, 60, 60, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, 7] = False
    mask[1, 32:] = False
    lists = BlockLists.from_mask(mask, 16, 32)
    q, k, v = make_qkv(lists)
    out, lse = attend(q, k, v, lists, return_lse=True, impl=impl)
    empty = ~mask.any(-1)
    assert (lse[0][empty] == -torch.inf).all()
    assert (out[0].transpose(0, 1)[empty] == 0).all()
    assert torch.isfinite(lse[0][~empty]).all()
    hidden = torch.full((1, 1, 60), -torch.inf)
    out, lse = attend(q, k, v, lists, key_bias=hidden, return_lse=True, impl=impl)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_skipped_head_gives_zero(impl, make_qkv) -> None:
    lists = random_lists(q_len=40, k_len=40, block_q=16, block_k=32, head_group=[-1, 0])
    out, lse = attend(*make_qkv(lists), lists, return_lse=True, impl=impl)
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()
    nobody = BlockLists.from_mask(torch.zeros(2, 40, 40, dtype=torch.bool), 16, 32)
    assert (attend(*make_qkv(nobody), nobody, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_stays_where_it_is(impl, make_qkv) -> None:
    lists = random_lists(q_len=70, k_len=70, block_q=32, block_k=32, head_group=[0, 1], keep=0.9, shuffled=True)
    q, k, v = make_qkv(lists)
    clean = attend(q, k, v, lists, impl=impl)
    q[0, 11, 1] = torch.nan
    out = attend(q, k, v, lists, impl=impl)
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = clean[0, 11, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
def test_hidden_key_blocks_never_leak(garbage, make_qkv) -> None:
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[:, :, 32:64] = False
    lists = BlockLists.from_mask(mask, 32, 32)
    q, k, v = make_qkv(lists)
    clean = attend(q, k, v, lists, impl="cpu")
    k[:, 32:64] = garbage
    v[:, 32:64] = garbage
    assert torch.equal(attend(q, k, v, lists, impl="cpu"), clean)


def test_any_strides_and_inputs_stay_untouched(make_qkv) -> None:
    lists = random_lists(q_len=60, k_len=60, block_q=16, block_k=32, head_group=[0, 0, 1], shuffled=True)
    q, k, v = make_qkv(lists, batch=2)
    wanted = attend(q, k, v, lists, impl="cpu")
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.zeros(2, 61, 3, 80)[:, 1:, :, 3:67].copy_(k)
    dim_first = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    before = [x.clone() for x in (heads_first, sliced, dim_first)]
    assert dim_first.stride(-1) != 1
    assert torch.allclose(attend(heads_first, sliced, dim_first, lists, impl="cpu"), wanted, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(before, (heads_first, sliced, dim_first), strict=True))
    expanded = q[:1].expand(2, -1, -1, -1)
    out = attend(expanded, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), lists, impl="cpu")
    assert torch.equal(out[0], out[1])


def test_reordering_the_slots_of_equal_masks_changes_nothing_but_rounding(make_qkv) -> None:
    mask = torch.rand(2, 80, 80, generator=torch.Generator().manual_seed(1)) < 0.4
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([order, torch.full((16,), -1)])
    plain = BlockLists.from_mask(mask, 32, 32)
    tiled = BlockLists.from_mask(mask, 32, 32, q_order=padded, k_order=padded)
    q, k, v = make_qkv(plain)
    assert torch.allclose(attend(q, k, v, plain, impl="cpu"), attend(q, k, v, tiled, impl="cpu"), atol=2e-6)


@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
def test_large_and_small_inputs(size, make_qkv) -> None:
    lists = random_lists(q_len=60, k_len=70, block_q=16, block_k=32, head_group=[0, 1])
    q, k, v = (x * size for x in make_qkv(lists))
    out, lse = attend(q, k, v, lists, return_lse=True, impl="cpu")
    check_attend(out, lse, q, k, v, lists)


def test_the_same_call_gives_the_same_bits(make_qkv) -> None:
    lists = random_lists(q_len=100, k_len=100, block_q=32, block_k=32, head_group=[0, 1], shuffled=True)
    q, k, v = make_qkv(lists)
    first = attend(q, k, v, lists, impl="cpu")
    assert all(torch.equal(attend(q, k, v, lists, impl="cpu"), first) for _ in range(5))
