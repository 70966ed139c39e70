"""The Triton kernel compiled for sm_90, without a GPU: registers, spills, tensor core instructions, pipelining."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs the triton package")

from visparse_kernels.attend.triton_impl import launch
from visparse_kernels.attend.triton_tuned import find_tiling, table
from visparse_kernels.testing import random_lists
from visparse_kernels.testing_compile import assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")

# what visparse asks for on GPUs, and what the Hopper kernel's lists bring
SIZES = [(64, 128, 64), (64, 192, 128), (128, 128, 64), (128, 128, 128), (256, 64, 64)]
CASES = sorted({*SIZES, *((row[1], *row[3:]) for row in table() if row[0] == (9, 0))})


def compile_for_hopper(head_dim, block_q, block_k, *, dtype=torch.bfloat16, bias=False, padded=True):
    cut = find_tiling(head_dim, dtype, block_q, block_k, ragged=padded)
    k_len = 4 * block_k - (1 if padded else 0)
    lists = random_lists(q_len=2 * block_q, k_len=k_len, block_q=block_q, block_k=block_k, head_group=[0] * 24)
    q, k = (torch.zeros(1, length, 24, head_dim, dtype=dtype) for length in (lists.q_len, k_len))
    out, lse = torch.empty_like(q), torch.empty(1, 24, lists.q_len)
    key_bias = torch.zeros(1, 1, k_len) if bias else None
    with hopper_driver():
        return cut, launch(q, k, k, out, lse, lists, 0.125, key_bias, cut, warm_up=True)


@pytest.mark.parametrize(("bias", "padded"), [(False, False), (True, True)])
@pytest.mark.parametrize(("head_dim", "block_q", "block_k"), CASES)
def test_bf16_uses_tensor_cores_and_keeps_its_sums_in_registers(head_dim, block_q, block_k, bias, padded) -> None:
    cut, kernel = compile_for_hopper(head_dim, block_q, block_k, bias=bias, padded=padded)
    made = assemble(kernel)
    assert made.registers * made.warps * 32 <= 65536
    assert made.spilled <= (768 if bias else 256)  # bytes; sums that spill take thousands
    assert made.shared <= 232448
    assert made.warps == cut.num_warps
    assert made.count("HGMMA") > 0
    assert made.count("LDGSTS") > 0  # rows are gathered by asynchronous copies


@pytest.mark.parametrize(("head_dim", "block_q", "block_k"), [(64, 192, 128), (128, 128, 64)])
def test_bf16_pipelines_keys_and_values_behind_the_order_table(head_dim, block_q, block_k) -> None:
    cut, kernel = compile_for_hopper(head_dim, block_q, block_k, padded=False)
    shape = f"{cut.num_stages}x{cut.tile_k}x{head_dim}xbf16"
    buffers = re.findall(rf"ttg.local_alloc.*memdesc<{shape}", str(kernel.asm["ttgir"]))
    assert len(buffers) >= 4  # K and V, in the full and in the partial loop


@pytest.mark.parametrize(("head_dim", "block_q", "block_k"), [(64, 192, 128), (128, 128, 64), (256, 64, 64)])
def test_fp32_compiles_without_reduced_precision(head_dim, block_q, block_k) -> None:
    _, kernel = compile_for_hopper(head_dim, block_q, block_k, dtype=torch.float32)
    assert "wgmma" not in kernel.asm["ptx"]
    assert ".tf32" not in kernel.asm["ptx"]
    assert assemble(kernel).spilled <= 1024  # larger tiles spill ten times as much and more
