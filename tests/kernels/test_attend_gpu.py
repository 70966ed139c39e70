"""The Triton kernel on a CUDA device: the same error rule, at sizes and in dtypes that the interpreter cannot do."""

import pytest
import torch

from visparse_kernels import BlockLists, attend, choose
from visparse_kernels.attend.api import attend_op
from visparse_kernels.testing import BROKEN, check_attend, poisoned_memory, random_lists
from visparse_kernels.testing_boxes import random_boxed_lists

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [(1, 1), (15, 17), (64, 64), (65, 127), (129, 1000), (1009, 251)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128, 256])
@pytest.mark.parametrize("shuffled", [False, True])
def test_error_rule(dtype, head_dim, shuffled, make_qkv) -> None:
    block_q, block_k = (128, 64) if head_dim <= 128 else (64, 64)
    lists = random_lists(
        q_len=517,
        k_len=611,
        block_q=block_q,
        block_k=block_k,
        head_group=[0, 1, -1, 0],
        shuffled=shuffled,
        seed=head_dim,
        device="cuda",
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_error_rule_for_lengths(dtype, lengths, make_qkv) -> None:
    lists = random_lists(
        q_len=lengths[0], k_len=lengths[1], block_q=64, block_k=64, head_group=[0, 1, 0], keep=0.7, device="cuda"
    )
    q, k, v = make_qkv(lists, dtype=dtype, device="cuda")
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("block_q", [16, 48, 192, 256])
@pytest.mark.parametrize("block_k", [32, 96, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_rule_for_block_sizes(block_q, block_k, head_dim, make_qkv) -> None:
    lists = random_lists(
        q_len=700, k_len=500, block_q=block_q, block_k=block_k, head_group=[0, 1], shuffled=True, device="cuda"
    )
    q, k, v = make_qkv(lists, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_q"), [(64, 192), (128, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_error_rule_for_the_blocks_of_the_hopper_kernel(dtype, head_dim, block_q, biased, make_qkv) -> None:
    lists = random_lists(
        q_len=900, k_len=1000, block_q=block_q, block_k=128, head_group=[0, 1, -1, 0], shuffled=biased, device="cuda"
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    bias = torch.randn(1, 4, 1000, device="cuda") if biased else None
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, key_bias=bias, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists, key_bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "q_box"), [(64, (3, 8, 8)), (128, (2, 8, 8))])
def test_error_rule_for_overlapping_boxes(dtype, head_dim, q_box, make_qkv) -> None:
    lists = random_boxed_lists(
        grid=(6, 20, 20), before=5, after=77, q_box=q_box, k_box=(2, 8, 8), head_group=[0, 1, -1, 0], device="cuda"
    )
    q, k, v = make_qkv(lists, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_key_bias(dtype, shape, make_qkv) -> None:
    lists = random_lists(
        q_len=300, k_len=333, block_q=128, block_k=64, head_group=[0, 1, 0], shuffled=True, device="cuda"
    )
    q, k, v = make_qkv(lists, batch=2, dtype=dtype, device="cuda")
    bias = torch.randn(*shape, 333, generator=torch.Generator().manual_seed(0))
    bias[..., ::3] = -torch.inf
    bias[0, 0] = -torch.inf
    bias = bias.cuda()
    out, lse = attend(q, k, v, lists, key_bias=bias, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists, key_bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_breaks_the_error_rule(dtype, broken, make_qkv) -> None:
    lists = random_lists(
        q_len=300, k_len=333, block_q=192, block_k=128, head_group=[0, 1], keep=0.6, seed=2, device="cuda"
    )
    q, k, v = make_qkv(lists, dtype=dtype, device="cuda")
    wrong, scale = BROKEN[broken](lists, 64**-0.5)
    out, lse = attend(q, k, v, wrong, scale=scale, return_lse=True, impl="triton")
    with pytest.raises(AssertionError, match="worst at"):
        check_attend(out, lse, q, k, v, lists)


def test_nan_and_garbage_stay_where_they_are(make_qkv) -> None:
    mask = torch.rand(2, 200, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, :64] = False
    lists = BlockLists.from_mask(mask, 64, 64).to("cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    clean = attend(q, k, v, lists, impl="triton")
    k[:, :64] = torch.nan
    v[:, :64] = torch.nan
    assert torch.equal(attend(q, k, v, lists, impl="triton"), clean)
    q[0, 11, 1] = torch.nan
    out = attend(q, k, v, lists, impl="triton")
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = clean[0, 11, 1]
    assert torch.equal(out, clean)


def test_strides(make_qkv) -> None:
    lists = random_lists(q_len=300, k_len=333, block_q=128, block_k=64, head_group=[0, 1], device="cuda")
    q, k, v = make_qkv(lists, batch=2, dtype=torch.bfloat16, device="cuda")
    wanted = attend(q, k, v, lists, impl="triton")
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.zeros(2, 334, 2, 80, dtype=k.dtype, device="cuda")[:, 1:, :, 3:67].copy_(k)
    dim_first = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(attend(heads_first, sliced, dim_first, lists, impl="triton"), wanted)


def test_the_same_call_gives_the_same_bits(make_qkv) -> None:
    lists = random_lists(q_len=1000, k_len=1000, block_q=128, block_k=64, head_group=[0, 1, 1], device="cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    first = attend(q, k, v, lists, impl="triton")
    assert all(torch.equal(attend(q, k, v, lists, impl="triton"), first) for _ in range(50))


def test_cuda_graph_replays_with_new_inputs(make_qkv) -> None:
    lists = random_lists(q_len=300, k_len=300, block_q=128, block_k=64, head_group=[0, 1], device="cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    attend(q, k, v, lists, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, lists, impl="triton")
    for x, new in zip((q, k, v), make_qkv(lists, dtype=torch.bfloat16, device="cuda", seed=7), strict=True):
        x.copy_(new)
    graph.replay()
    assert torch.equal(out, attend(q, k, v, lists, impl="triton"))


def test_choice_and_opcheck(make_qkv) -> None:
    lists = random_lists(q_len=100, k_len=100, block_q=64, block_k=64, head_group=[0, 1], device="cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    assert choose(q, lists) == "triton"
    tables = (lists.head_group, lists.q_order, lists.k_order, lists.full_offsets, lists.full_indices)
    masked = (lists.partial_offsets, lists.partial_indices, lists.partial_tiles, lists.tiles)
    torch.library.opcheck(attend_op, (q, k, v, None, *tables, *masked, None, None, [], 64, 64, 0.125, "triton"))


def test_memory_is_that_of_the_results(make_qkv) -> None:
    lists = random_lists(q_len=4000, k_len=4000, block_q=128, block_k=64, head_group=[0, 1], device="cuda")
    q, k, v = make_qkv(lists, dtype=torch.bfloat16, device="cuda")
    attend(q, k, v, lists, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, lists, return_lse=True, impl="triton")
    results = q.numel() * 2 + 4000 * 2 * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096
