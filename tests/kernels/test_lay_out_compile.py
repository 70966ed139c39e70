"""The kernel of `lay_out` compiled for sm_90, without a GPU: registers, spills, wide loads and stores."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs the triton package")

from visparse_kernels.lay_out.triton_impl import launch
from visparse_kernels.testing_compile import assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")


@pytest.mark.parametrize(("parts", "pool"), [(8, 2), (1, 1), (0, 4), (0, 0)])
@pytest.mark.parametrize(("head_dim", "blocks"), [(64, (192, 128)), (128, (128, 128))])
def test_rows_move_sixteen_bytes_at_a_time(head_dim, blocks, parts, pool) -> None:
    q, k, v = torch.zeros(1, 384, 3, 6, head_dim, dtype=torch.bfloat16).unbind(2)
    orders = tuple(torch.arange(384, dtype=torch.int32) for _ in range(2))
    n_q, n_k = (384 // block for block in blocks)
    rows = [torch.empty(1, 6, 384, head_dim, dtype=torch.bfloat16) for _ in range(3)]
    means: list[torch.Tensor | None] = [None] * 4
    if parts:
        means[:2] = [torch.empty(1, 6, n, head_dim) for n in (n_q, n_k * parts)]
    if pool:
        means[2:] = [torch.empty(1, n_k * pool, 6, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    with hopper_driver():
        made = assemble(launch((q, k, v), orders, blocks, parts, pool, rows, means, warm_up=True))
    assert made.spilled == 0
    assert made.registers * made.warps * 32 <= 16384  # four programs and more keep a multiprocessor busy
    assert len(re.findall(r"\bLDG\.E\.128\b", made.sass)) >= 8
    assert len(re.findall(r"\bSTG\.E\.128\b", made.sass)) >= 8
