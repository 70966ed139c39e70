"""The kernels of proxy tokens compiled for sm_90, without a GPU: registers, spills, tensor core instructions."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs the triton package")

from visparse_kernels.proxies.testing import random_case
from visparse_kernels.proxies.triton_impl import launch_attend, launch_pool, tiling
from visparse_kernels.testing_compile import assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")

SIZES = [(64, 128), (64, 192), (64, 64), (128, 128), (128, 192), (128, 64), (256, 64)]
HOPPER = torch.device("cpu")  # what the rule takes for an sm_90 GPU


def compile_attend(head_dim, block_q, dtype=torch.bfloat16, n_proxies=1181, moved=False):
    cut = tiling(HOPPER, dtype, head_dim, block_q)
    case = random_case(
        length=2 * block_q, n_proxies=n_proxies, block_q=block_q, head_group=[0] * 24, head_dim=head_dim, dtype=dtype
    )
    out, lse = torch.empty_like(case.out), torch.empty_like(case.lse)
    with hopper_driver():
        places = case.q_order if moved else None
        return cut, launch_attend(*case.arguments(), 0.125, out, lse, cut, out_order=places, warm_up=True)


@pytest.mark.parametrize(("head_dim", "block_q"), SIZES)
def test_bf16_uses_tensor_cores_and_keeps_its_sums_in_registers(head_dim, block_q) -> None:
    cut, kernel = compile_attend(head_dim, block_q)
    made = assemble(kernel)
    assert made.registers * made.warps * 32 <= 65536
    assert made.spilled <= (256 if head_dim >= 128 else 0)  # bytes; sums take thousands
    assert made.shared <= 232448
    assert made.warps == cut.num_warps
    assert made.count("HGMMA") > 0
    assert (made.count("LDGSTS") > 0) == (cut.num_stages > 1)  # proxies come by asynchronous copies


@pytest.mark.parametrize(("head_dim", "block_q"), [(32, 128), (256, 64)])
def test_bf16_pipelines_keys_and_values(head_dim, block_q) -> None:
    cut, kernel = compile_attend(head_dim, block_q)
    shape = f"{cut.num_stages}x{cut.tile_k}x{head_dim}xbf16"
    assert len(re.findall(rf"ttg.local_alloc.*memdesc<{shape}", str(kernel.asm["ttgir"]))) == 2  # K and V


def test_four_programs_with_small_heads_share_a_multiprocessor() -> None:
    _, kernel = compile_attend(64, 192, n_proxies=86, moved=True)
    made = assemble(kernel)
    assert (made.spilled, made.registers <= 128, 4 * made.shared <= 232448) == (0, True, True)


@pytest.mark.parametrize(("head_dim", "block_q"), [(64, 128), (128, 128), (256, 64)])
def test_fp32_compiles_without_reduced_precision(head_dim, block_q) -> None:
    _, kernel = compile_attend(head_dim, block_q, torch.float32)
    assert "wgmma" not in kernel.asm["ptx"]
    assert ".tf32" not in kernel.asm["ptx"]
    assert assemble(kernel).spilled <= 1024


@pytest.mark.parametrize("with_shares", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_pooling_reads_sixteen_bytes_at_a_time(head_dim, with_shares) -> None:
    k = torch.zeros(1, 256, 24, head_dim, dtype=torch.bfloat16)
    members = torch.arange(256, dtype=torch.int32).view(4, 64)
    shares = torch.zeros(1, 1, 4, 64) if with_shares else None
    pooled = torch.empty(1, 4, 24, head_dim, dtype=torch.bfloat16)
    with hopper_driver():
        made = assemble(launch_pool(k, k, members, shares, pooled, torch.empty_like(pooled), warm_up=True))
    assert made.spilled == 0
    assert made.registers <= 128  # four programs and more keep a multiprocessor busy
    assert len(re.findall(r"\bLDG\.E\.128\b", made.sass)) >= 8
