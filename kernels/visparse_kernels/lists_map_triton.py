"""Lists from a map of kept blocks in two launches and a running sum: blocks of each row are counted, then written."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: SIM102  (a constexpr condition must stand alone)

import torch
import triton
import triton.language as tl
from torch import Tensor

from visparse_kernels.kernels_apply import power

_FLAGS = 1024  # flags that a program of four warps holds at once


@triton.jit(do_not_specialize=["n_rows", "n_k"])
def count_kernel(kept, counts, zeros, n_rows, n_k, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Write 0, then how many blocks each row keeps; and as many zeros."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    kept += tl.program_id(0).to(tl.int64) * ROWS * n_k
    flags = kept + tl.arange(0, ROWS)[:, None] * n_k
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, n_k, CHUNK):
        block = first + tl.arange(0, CHUNK)[None, :]
        inside = real[:, None] & (block < n_k)
        count += tl.sum(tl.load(flags + block, mask=inside, other=0).to(tl.int32), 1)
    tl.store(counts + row + 1, count, mask=real)
    tl.store(zeros + row + 1, 0, mask=real)
    if tl.program_id(0) == 0:
        tl.store(counts, 0)
        tl.store(zeros, 0)


@triton.jit(do_not_specialize=["n_rows", "n_k", "room"])
def write_kernel(kept, offsets, indices, fits, n_rows, n_k, room, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Write the blocks that each row keeps, ascending, as far as there is room; and whether there is."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    kept += tl.program_id(0).to(tl.int64) * ROWS * n_k
    flags = kept + tl.arange(0, ROWS)[:, None] * n_k
    place = tl.load(offsets + row, mask=real, other=0)
    for first in range(0, n_k, CHUNK):
        block = first + tl.arange(0, CHUNK)[None, :]
        inside = real[:, None] & (block < n_k)
        flag = tl.load(flags + block, mask=inside, other=0).to(tl.int32)
        to = place[:, None] + tl.cumsum(flag, 1) - 1
        tl.store(indices + to, block + tl.zeros_like(flag), mask=(flag != 0) & (to < room))
        place += tl.sum(flag, 1)
    if fits is not None:
        if tl.program_id(0) == 0:
            tl.store(fits, tl.load(offsets + n_rows) <= room)


def constants(n_k: int) -> dict[str, int]:
    """Return how the kernels cut rows of ``n_k`` blocks."""
    chunk = min(max(32, power(n_k)), 1024)
    return {"ROWS": _FLAGS // chunk, "CHUNK": chunk, "num_warps": 4}


def fill(kept: Tensor, room: int, *, checked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Write the lists of a map.

    Args:
        kept: bool [G, n_q, n_k], not empty, on a GPU.
        room: how many blocks the lists have room for; no more are written.
        checked: whether to tell if that is enough.

    Returns:
        int32 [G * n_q + 1], first block of each row in the next; int32 [room], behind the last offset unwritten;
        int32 [G * n_q + 1], zeros; bool [], whether there is room for all, or None.
    """
    kept = kept.contiguous()
    n_k = kept.shape[-1]
    n_rows = kept.numel() // n_k
    cut = constants(n_k)
    grid = (-(-n_rows // cut["ROWS"]),)
    counts, zeros, indices = (
        torch.empty(size, dtype=torch.int32, device=kept.device) for size in (n_rows + 1, n_rows + 1, room)
    )
    fits = torch.empty((), dtype=torch.bool, device=kept.device) if checked else None
    with torch.cuda.device_of(kept):
        count_kernel[grid](kept, counts, zeros, n_rows, n_k, **cut)
        offsets = counts.cumsum(0, dtype=torch.int32)
        write_kernel[grid](kept, offsets, indices, fits, n_rows, n_k, room, **cut)
    return offsets, indices, zeros, fits
