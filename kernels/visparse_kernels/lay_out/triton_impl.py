"""`lay_out` on CUDA: the launch of the Triton kernel."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visparse_kernels.kernels_apply import power
from visparse_kernels.same import Same

try:
    from visparse_kernels.attend.triton_kernel import INTERPRET
    from visparse_kernels.lay_out.triton_kernel import lay_out_kernel
except ImportError as error:
    _MISSING: str | None = f"needs the triton package, which could not be imported ({error})"
    INTERPRET = False
else:
    _MISSING = None

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = 256  # slots of a block


def can_run(device: torch.device, dtype: torch.dtype, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cuda" and not INTERPRET:
        return f"needs tensors on a CUDA device, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs fp16, bf16 or fp32, got {dtype}"
    if block_k & (block_k - 1) or not 16 <= block_k <= _LARGEST:
        return f"needs block_k to be a power of 2 from 16 to {_LARGEST}, got {block_k}"
    if block_q % 16:
        return f"needs block_q to be a multiple of 16, got {block_q}"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, block_q: int, block_k: int, parts: int, pool: int
) -> tuple[Tensor | None, ...]:
    """Launch the kernel; see `visparse_kernels.lay_out.api.lay_out`.

    Returns:
        The parts of `InOrder`, in their order.
    """
    batch, length, heads, head_dim = q.shape
    n_q, n_k = len(q_order) // block_q, len(k_order) // block_k
    rows = [torch.empty(batch, heads, length, head_dim, dtype=q.dtype, device=q.device) for _ in range(3)]
    means: list[Tensor | None] = [None] * 4
    if parts:
        sizes = (n_q, n_k * parts)
        means[:2] = [torch.empty(batch, heads, n, head_dim, dtype=torch.float32, device=q.device) for n in sizes]
    if pool:
        means[2:] = [torch.empty(batch, n_k * pool, heads, head_dim, dtype=q.dtype, device=q.device) for _ in range(2)]
    with torch.cuda.device_of(q):
        launch((q, k, v), (q_order, k_order), (block_q, block_k), parts, pool, rows, means)
    return *(x.transpose(1, 2) for x in rows), *means


def launch(
    sources: tuple[Tensor, Tensor, Tensor],
    orders: tuple[Tensor, Tensor],
    blocks: tuple[int, int],
    parts: int,
    pool: int,
    rows: list[Tensor],
    means: list[Tensor | None],
    *,
    chunk: int = 64,
    num_warps: int = 2,
    warm_up: bool = False,
) -> Any:
    """Launch the kernel.

    Args:
        sources: q, k and v [B, N, H, D], last axis contiguous.
        orders: of queries and of keys, int32 [slots].
        blocks: slots of a block of queries and of one of keys.
        parts, pool: as in `visparse_kernels.lay_out.api.lay_out`.
        rows: three tensors [B, H, N, D], contiguous, written.
        means: q_mean, k_mean, pooled_k and pooled_v, contiguous, written, or None.
        chunk: most rows that a program has on their way at once.
        num_warps: of a program; with more, sums of parts cross warps (kernels/benchmarks/lay_out.py).
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    batch, length, heads, head_dim = sources[0].shape
    n_q, n_k = (len(order) // block for order, block in zip(orders, blocks, strict=True))
    arguments = (
        *sources,
        *rows,
        *means,
        orders[0],
        places(Same(orders[0])),
        orders[1],
        places(Same(orders[1])),
        *(stride for x in sources for stride in x.stride()[:3]),
        length,
        n_q,
        n_k,
    )
    constants = {
        "HEADS": heads,
        "BLOCK_Q": blocks[0],
        "BLOCK_K": blocks[1],
        "PARTS": parts,
        "POOL": pool,
        "CHUNK_Q": min(chunk, blocks[0] & -blocks[0]),
        "CHUNK_K": min(chunk, blocks[1]),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": power(head_dim),
        "num_warps": num_warps,
    }
    grid = (max(n_q, n_k) * heads, batch, 3)
    if warm_up:
        return lay_out_kernel.warmup(*arguments, grid=grid, **constants)
    return lay_out_kernel[grid](*arguments, **constants)


@lru_cache(maxsize=32)
def places(order: Same) -> Tensor:
    """The place of each slot's token among all tokens in the order of the slots, int32 [slots]; kept."""
    return ((order.tensor >= 0).cumsum(0) - 1).to(torch.int32)
