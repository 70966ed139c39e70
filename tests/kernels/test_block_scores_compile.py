"""The kernel of block scores compiled for sm_90, without a GPU: no spills, tensor cores, TMA, two programs at once."""

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs the triton package")

from visparse_kernels.block_scores.triton_impl import Variant, launch, variant_for
from visparse_kernels.testing_compile import assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")

CPU = torch.device("cpu")


def compile_for_hopper(cut, *, head_dim=128, rows_q=32, block_k=128, dtype=torch.bfloat16, variance=True):
    n_q, n_k, heads = 9, 5, 4
    q = torch.zeros(1, n_q * rows_q, heads, head_dim, dtype=dtype)
    k = torch.zeros(1, n_k * block_k, heads, head_dim, dtype=dtype)
    lse, scores = torch.zeros(1, heads, n_q * rows_q), torch.zeros(1, heads, n_q, n_k)
    q_rows = torch.arange(n_q * rows_q, dtype=torch.int32).view(n_q, rows_q)
    k_rows = torch.arange(n_k * block_k, dtype=torch.int32).view(n_k, block_k)
    with hopper_driver():
        return assemble(launch(q, k, lse, scores, q_rows, k_rows, None, 0.1, variance, cut, warm_up=True))


@pytest.mark.parametrize(
    ("head_dim", "rows_q", "block_k"),
    [(64, 48, 128), (64, 32, 128), (128, 32, 128), (128, 128, 128), (128, 32, 64), (128, 256, 128), (256, 16, 64)],
)
@pytest.mark.parametrize("variance", [False, True])
def test_bf16_as_it_is_launched(head_dim, rows_q, block_k, variance) -> None:
    cut = variant_for(CPU, torch.bfloat16, head_dim, rows_q, block_k)
    assert cut is not None
    made = compile_for_hopper(cut, head_dim=head_dim, rows_q=rows_q, block_k=block_k, variance=variance)
    assert made.spilled <= (64 if rows_q == 256 else 0)
    assert made.count("HGMMA") > 0
    assert made.sass.count("UTMALDG") > 0
    assert made.shared <= 232448
    if head_dim <= 128 and rows_q <= 128:
        # registers and shared memory for two programs on a multiprocessor
        assert made.registers * made.warps * 32 * 2 <= 65536
        assert made.shared * 2 <= 232448
    assert not made.warnings


@pytest.mark.parametrize(
    "cut",
    [
        Variant(tile_q=128, num_warps=8, num_stages=2, tma=False, registers=128),
        Variant(tile_q=64, num_warps=4, num_stages=3, tma=True),
        Variant(tile_q=64, num_warps=4, num_stages=2, tma=False),
    ],
)
def test_other_variants(cut) -> None:
    made = compile_for_hopper(cut)
    assert made.spilled == 0
    assert (made.sass.count("UTMALDG") > 0) == cut.tma
    assert (made.count("LDGSTS") > 0) == (not cut.tma)


def test_large_blocks_of_large_heads_do_not_fit() -> None:
    assert variant_for(CPU, torch.bfloat16, 512, 256, 256) is None
