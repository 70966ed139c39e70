"""The Triton kernel in Triton's CPU interpreter; test_attend_interpreter.py runs this file with TRITON_INTERPRET=1.

fp16 and fp32 only: the interpreter multiplies bf16 wrongly.
"""

import pytest
import torch

from visparse_kernels import BlockLists, attend, choose, explain
from visparse_kernels.boxes import Boxes, box_tokens
from visparse_kernels.testing import BROKEN, check_attend, poisoned_memory, random_lists
from visparse_kernels.testing_boxes import random_boxed_lists

pytestmark = pytest.mark.interpreter

CASES = {
    "odd": {"q_len": 61, "k_len": 67, "block_q": 16, "block_k": 32, "head_group": [0, 1, -1]},
    "orders": {"q_len": 50, "k_len": 90, "block_q": 32, "block_k": 64, "head_group": [1, 0], "shuffled": True},
    "wide": {"q_len": 70, "k_len": 140, "block_q": 16, "block_k": 128, "head_group": [0, 0]},
    "no padding": {"q_len": 32, "k_len": 96, "block_q": 16, "block_k": 32, "head_group": [0, 1]},
    "parts of query blocks": {"q_len": 100, "k_len": 70, "block_q": 48, "block_k": 32, "head_group": [0, 1, -1]},
    "parts of key blocks": {"q_len": 40, "k_len": 400, "block_q": 16, "block_k": 96, "head_group": [0, 1, 1]},
    "parts of both": {"q_len": 250, "k_len": 300, "block_q": 192, "block_k": 128, "head_group": [1, 0]},
    "parts, orders": {
        "q_len": 130,
        "k_len": 300,
        "block_q": 48,
        "block_k": 128,
        "head_group": [0, 1],
        "shuffled": True,
    },
    "one": {"q_len": 1, "k_len": 1, "block_q": 16, "block_k": 32, "head_group": [0], "keep": 1.0, "partial": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_rule(case, dtype, make_qkv) -> None:
    lists = random_lists(**CASES[case], seed=3)
    q, k, v = make_qkv(lists, dtype=dtype, batch=2 if case == "odd" else 1)
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("head_dim", [8, 32, 72, 128, 256])
def test_error_rule_for_head_sizes(head_dim, make_qkv) -> None:
    lists = random_lists(q_len=40, k_len=50, block_q=16, block_k=32, head_group=[0, 1], shuffled=True)
    q, k, v = make_qkv(lists, head_dim=head_dim)
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton", scale=0.2)
    check_attend(out, lse, q, k, v, lists, scale=0.2)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_key_bias(shape, make_qkv) -> None:
    lists = random_lists(q_len=40, k_len=50, block_q=16, block_k=32, head_group=[0, 1, 0], shuffled=True)
    q, k, v = make_qkv(lists, batch=2)
    bias = torch.randn(*shape, 50, generator=torch.Generator().manual_seed(0))
    bias[..., ::3] = -torch.inf
    bias[0, 0] = -torch.inf
    out, lse = attend(q, k, v, lists, key_bias=bias, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists, key_bias=bias)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(broken, make_qkv) -> None:
    lists = random_lists(q_len=64, k_len=80, block_q=16, block_k=32, head_group=[0, 1], keep=0.6, seed=2)
    q, k, v = make_qkv(lists, dtype=torch.float16)
    wrong, scale = BROKEN[broken](lists, 64**-0.5)
    out, lse = attend(q, k, v, wrong, scale=scale, return_lse=True, impl="triton")
    with pytest.raises(AssertionError, match="worst at"):
        check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule_in_parts(broken, make_qkv) -> None:
    lists = random_lists(q_len=96, k_len=250, block_q=48, block_k=128, head_group=[0, 1], keep=0.8, seed=2)
    q, k, v = make_qkv(lists, dtype=torch.float16)
    wrong, scale = BROKEN[broken](lists, 64**-0.5)
    out, lse = attend(q, k, v, wrong, scale=scale, return_lse=True, impl="triton")
    with pytest.raises(AssertionError, match="worst at"):
        check_attend(out, lse, q, k, v, lists)


def test_overlapping_boxes_in_parts(make_qkv) -> None:
    lists = random_boxed_lists(
        grid=(3, 9, 10), before=5, after=7, q_box=(3, 4, 4), k_box=(2, 8, 8), head_group=[0, 1, 0], keep=0.7
    )
    q, k, v = make_qkv(lists, dtype=torch.float16)
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


def test_padding_of_boxes_is_hidden_where_slots_are_as_many_as_keys(make_qkv) -> None:
    # three boxes of two rows in a grid of six: the last one hangs over, and the fifth row lies in none
    starts = torch.tensor([[[0, 0, 0], [0, 2, 0], [0, 5, 0]]], dtype=torch.int32)
    grid, box = (1, 6, 16), (1, 2, 16)
    boxes = Boxes(
        grid=grid, first=0, q_box=(None,), k_box=(box,), q_starts=starts.new_tensor([[[-1, 0, 0]]]), k_starts=starts
    )
    lists = BlockLists.from_entries(
        q_len=16,
        k_len=96,
        block_q=16,
        block_k=32,
        head_group=torch.tensor([0]),
        q_order=None,
        k_order=box_tokens(grid, 0, box, starts[0]).flatten(),
        rows=torch.zeros(3, dtype=torch.int64),
        cols=torch.arange(3),
        tile=torch.full((3,), -1),
        boxes=boxes,
    ).validate()
    q, k, v = make_qkv(lists)
    k, v = (torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1)[:, 1:] for x in (k, v))
    out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
def test_padding_and_hidden_blocks_never_leak(garbage, make_qkv) -> None:
    # key 0 is what a padding slot would read if -1 were taken for a token
    mask = torch.rand(1, 40, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, :32] = False
    lists = BlockLists.from_mask(mask, 16, 32)
    q, k, v = make_qkv(lists)
    clean, clean_lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    k[:, :32] = garbage
    v[:, :32] = garbage
    out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    assert torch.equal(out, clean)
    assert torch.equal(lse, clean_lse)
    q[0, 11] = torch.nan
    out = attend(q, k, v, lists, impl="triton")
    assert out[0, 11].isnan().all()
    out[0, 11] = clean[0, 11]
    assert torch.equal(out, clean)


def test_strides(make_qkv) -> None:
    lists = random_lists(q_len=40, k_len=50, block_q=16, block_k=32, head_group=[0, 1])
    q, k, v = make_qkv(lists, batch=2)
    wanted = attend(q, k, v, lists, impl="triton")
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.zeros(2, 51, 2, 80)[:, 1:, :, 3:67].copy_(k)
    dim_first = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(attend(heads_first, sliced, dim_first, lists, impl="triton"), wanted)


def test_choice_in_the_interpreter(make_qkv) -> None:
    lists = random_lists(q_len=40, k_len=50, block_q=16, block_k=32, head_group=[0])
    q, _, _ = make_qkv(lists)
    assert choose(q, lists) == "triton"
    assert explain(q.bfloat16(), lists)[1][1:] == (
        False,
        "bf16 products are wrong in Triton's interpreter; use fp16 or fp32 there",
    )
    other = random_lists(q_len=40, k_len=50, block_q=24, block_k=32, head_group=[0])
    with pytest.raises(ValueError, match=r"needs block_q to be a multiple of 16 and block_k of 32, got 24 and 32"):
        choose(q, other, "triton")
