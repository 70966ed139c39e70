"""The kernels of lists, choices and hidden proxies compiled for sm_90, without a GPU: all is held in registers."""

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs the triton package")

from visparse_kernels import lists_map_triton
from visparse_kernels.attend import gluon_program_triton
from visparse_kernels.block_scores import choosing_triton
from visparse_kernels.proxies import hidden_triton
from visparse_kernels.testing_compile import Compiled, assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")

SIZES = [1, 44, 591, 1024, 1500]
FLAGS, FLAG = torch.zeros(64, dtype=torch.bool), torch.zeros((), dtype=torch.bool)
INTS, LONGS = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int64)


def compiled(kernel, *arguments, **constants) -> Compiled:
    with hopper_driver():
        return assemble(kernel.warmup(*arguments, grid=(1,), **constants))


@pytest.mark.parametrize("n_k", SIZES)
def test_lists(n_k) -> None:
    cut = lists_map_triton.constants(n_k)
    for fits in (None, FLAG):
        made = compiled(lists_map_triton.write_kernel, FLAGS, INTS, INTS, fits, 96, n_k, 64, **cut)
        assert (made.spilled, made.registers <= 128) == (0, True)
    made = compiled(lists_map_triton.count_kernel, FLAGS, INTS, INTS, 96, n_k, **cut)
    assert (made.spilled, made.registers <= 128) == (0, True)


@pytest.mark.parametrize("n_k", SIZES)
@pytest.mark.parametrize("ragged", [False, True])
def test_program(n_k, ragged) -> None:
    tensors = (INTS, INTS, LONGS, INTS, INTS, INTS, LONGS, INTS, INTS)
    kernel, cut = gluon_program_triton.full_program_kernel, gluon_program_triton.constants(n_k)
    made = compiled(kernel, *tensors, 96, 64, RAGGED=ragged, **cut)
    assert (made.spilled, made.registers <= 128) == (0, True)


@pytest.mark.parametrize("tile", [INTS, LONGS])
def test_hidden_proxies(tile) -> None:
    cut = {"ROWS": hidden_triton.ROWS, "WORDS": hidden_triton.WORDS, "num_warps": 4}
    made = compiled(hidden_triton.hidden_kernel, FLAGS, tile, INTS, 96, 44, 176, 6, **cut)
    assert (made.spilled, made.registers <= 128) == (0, True)


@pytest.mark.parametrize("n_k", [n for n in SIZES if n <= choosing_triton.LONGEST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [7, INTS], ids=["one count", "counts"])
def test_top_k(n_k, dtype, count) -> None:
    cut = choosing_triton.constants(n_k) | {"ONE_COUNT": isinstance(count, int)}
    scores = torch.zeros(64, dtype=dtype)
    made = compiled(choosing_triton.top_k_kernel, scores, FLAGS, count, 44, 44, 96, 30, n_k, 6, **cut)
    assert (made.spilled, made.registers <= 168) == (0, True)
    assert made.shared == 0  # sums over a row stay inside the warp
