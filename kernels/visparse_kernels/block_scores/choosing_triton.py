"""The highest blocks of each row in one launch: the least score that is kept is found by bisection, in registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from visparse_kernels.kernels_apply import power

LONGEST = 1024  # blocks in a row that a warp holds
_SCORES = 256  # scores that a warp holds where rows are short


@triton.jit
def _ordered(scores):
    """Map floats to integers of the same order: both zeros are one number, NaN is over infinity."""
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -size, size)
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, key)


@triton.jit(do_not_specialize=["step", "step_outer", "n_rows", "n_q", "n_k", "n_counts"])
def top_k_kernel(
    scores, kept, counts, step_outer, step, n_rows, n_q, n_k, n_counts, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONE_COUNT: tl.constexpr,
):  # fmt: skip
    """Keep the ``counts`` highest scores of some rows; of equal ones the first.

    ``counts`` is one number, or one for each of ``n_counts`` tables of n_q rows, and again from the first.

    Between ``low`` and ``high`` lies the lowest score that is kept; where exactly ``count`` are not below a limit, the
    search ends.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows)[:, None] & (block < n_k)
    start = (row // n_q).to(tl.int64) * step_outer + (row % n_q).to(tl.int64) * step
    if ONE_COUNT:
        count = tl.zeros([ROWS], tl.int32) + counts
    else:
        count = tl.load(counts + (row // n_q) % n_counts, mask=row < n_rows, other=1)
    key = _ordered(tl.load(scores + start[:, None] + block, mask=inside, other=0.0))
    # what is not there is under all others; a row that is not there has nothing to find
    key = tl.where(inside, key, -0x7FFFFFFF)
    high = tl.max(key, 1)
    low = tl.min(tl.where(inside, key, 0x7FFFFFFF), 1)
    low = tl.minimum(low, high)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        number = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        searching = low < high
        low = tl.where(searching & (number >= count), middle, low)
        high = tl.where(searching & (number < count), middle - 1, tl.where(number == count, low, high))
    above = key > low[:, None]
    equal = key == low[:, None]
    left = count - tl.sum(above.to(tl.int32), 1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
    kept += tl.program_id(0).to(tl.int64) * ROWS * n_k
    tl.store(kept + tl.arange(0, ROWS)[:, None] * n_k + block, chosen, mask=inside)


def constants(n_k: int) -> dict[str, int]:
    """Return how the kernel cuts rows of ``n_k`` scores; one warp, so that sums over a row need no shared memory."""
    columns = max(32, power(n_k))
    return {"ROWS": max(1, _SCORES // columns), "COLUMNS": columns, "num_warps": 1}


def can_choose(scores: Tensor) -> bool:
    """Return whether the kernel takes scores of this dtype and length."""
    return scores.dtype in (torch.float32, torch.float16) and scores.shape[-1] <= LONGEST


def top_k(scores: Tensor, count: int | Tensor) -> Tensor:
    """Launch the kernel; see `choosing.choose_top_k`.

    Args:
        scores: [..., n_k], not empty, on a GPU; see `can_choose`.
        count: 1 to n_k; or int32 [H], contiguous, for scores [B, H, n_q, n_k].
    """
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    n_q, n_k = scores.shape[-2] if scores.ndim > 1 else 1, scores.shape[-1]
    rows = scores.reshape(-1, n_q, n_k)  # a copy only where these axes cannot be joined
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    n_rows, cut = len(rows) * n_q, constants(n_k)
    with torch.cuda.device_of(scores):
        top_k_kernel[(-(-n_rows // cut["ROWS"]),)](
            rows,
            kept,
            count,
            rows.stride(0),
            rows.stride(1),
            n_rows,
            n_q,
            n_k,
            1 if isinstance(count, int) else len(count),
            ONE_COUNT=isinstance(count, int),
            **cut,
        )
    return kept
