"""The program of lists of full blocks in one launch: what `gluon_program.fill_entries` does in torch operations."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from visparse_kernels.attend.gluon_tables import Tables
from visparse_kernels.kernels_apply import power

_ENTRIES = 512  # entries that a program of four warps holds at once


@triton.jit
def _entry(indices, k_masks, first, last, step, CHUNK: tl.constexpr):
    """Read a chunk of entries of each row: which of them there are, their blocks, the masks of these."""
    place = first[:, None] + step + tl.arange(0, CHUNK)[None, :]
    inside = place < last[:, None]
    block = tl.load(indices + place, mask=inside, other=0)
    return inside, block, tl.load(k_masks + block, mask=inside, other=-1)


@triton.jit(do_not_specialize=["n_rows", "room"])
def full_program_kernel(
    offsets, indices, k_starts, k_masks, own_offsets, unmasked, starts, masks, blocks, n_rows, room,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the entries of some rows, those with padding last, and one more entry behind the last row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    first = tl.minimum(tl.load(offsets + row, mask=real, other=0), room)
    last = tl.minimum(tl.load(offsets + row + 1, mask=real, other=0), room)
    most = tl.max(last - first, 0)
    plain = last - first
    if RAGGED:
        for step in range(0, most, CHUNK):
            inside, _, mask = _entry(indices, k_masks, first, last, step, CHUNK)
            plain -= tl.sum((mask >= 0).to(tl.int32), 1)
    early, late = first, first + plain  # where the next entry of each half goes
    for step in range(0, most, CHUNK):
        inside, block, mask = _entry(indices, k_masks, first, last, step, CHUNK)
        place = first[:, None] + step + tl.arange(0, CHUNK)[None, :]
        if RAGGED:
            is_late = (mask >= 0).to(tl.int32)
            is_early = inside.to(tl.int32) - is_late
            to_late = late[:, None] + tl.cumsum(is_late, 1) - 1
            place = tl.where(is_late != 0, to_late, early[:, None] + tl.cumsum(is_early, 1) - 1)
            early += tl.sum(is_early, 1)
            late += tl.sum(is_late, 1)
        tl.store(blocks + place, block, mask=inside)
        tl.store(masks + place, mask, mask=inside)
        tl.store(starts + place, tl.load(k_starts + block, mask=inside, other=0), mask=inside)
    tl.store(unmasked + row, plain, mask=real)
    tl.store(own_offsets + row + 1, last, mask=real)
    if tl.program_id(0) == 0:
        tl.store(own_offsets, 0)
        behind = tl.minimum(tl.load(offsets + n_rows), room)
        tl.store(blocks + behind, 0)
        tl.store(masks + behind, tl.load(k_masks))
        tl.store(starts + behind, tl.load(k_starts))


def constants(n_k: int) -> dict[str, int]:
    """Return how the kernel cuts rows with a choice of ``n_k`` blocks; a quarter of them is held at once."""
    chunk = min(max(32, power(n_k) // 4), 256)
    return {"ROWS": _ENTRIES // chunk, "CHUNK": chunk, "num_warps": 4}


def fill_entries(offsets: Tensor, indices: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write the entries of a program; see `gluon_program.fill_entries`.

    What lies behind the entry at the last offset is not written. Lists with more blocks than room are cut there.
    """
    offsets, indices = offsets.contiguous(), indices.contiguous()
    n_rows, room = len(offsets) - 1, len(indices)
    own, unmasked, masks, blocks = (
        torch.empty(size, dtype=torch.int32, device=offsets.device) for size in (n_rows + 1, n_rows, room + 1, room + 1)
    )
    starts = torch.empty(room + 1, dtype=torch.int64, device=offsets.device)
    cut = constants(len(tables.k_masks))
    grid = (-(-n_rows // cut["ROWS"]),)
    with torch.cuda.device_of(offsets):
        full_program_kernel[grid](
            offsets, indices, tables.k_starts, tables.k_masks, own, unmasked, starts, masks, blocks, n_rows, room,
            RAGGED=tables.ragged, **cut,
        )  # fmt: skip
    return own, unmasked, starts, masks, blocks
