"""`attend` on CUDA: launch of the Triton kernel for all heads, groups and batch rows at once."""

import math

import torch
from torch import Tensor

from visparse_kernels.lists import BlockLists

try:
    from visparse_kernels.attend.triton_kernel import INTERPRET, attend_kernel, max_shared_memory
except ImportError as error:
    _MISSING: str | None = f"needs the triton package, which could not be imported ({error})"
    INTERPRET = False
else:
    _MISSING = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS_Q = (16, 32, 64, 128, 256)
_BLOCKS_K = (32, 64, 128)


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cuda" and not INTERPRET:
        return f"needs tensors on a CUDA device, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs fp32, bf16 or fp16, got {dtype}"
    if INTERPRET and dtype == torch.bfloat16:
        return "bf16 products are wrong in Triton's interpreter; use fp16 or fp32 there"
    if block_q not in _BLOCKS_Q or block_k not in _BLOCKS_K:
        return f"needs block_q in {_BLOCKS_Q} and block_k in {_BLOCKS_K}, got {block_q} and {block_k}"
    if device.type == "cuda":
        limit = max_shared_memory(device.index or 0)
        if _stages(head_dim, dtype, block_q, block_k, limit) < 1:
            return f"needs more than the {limit} bytes of shared memory of this device; use smaller blocks"
    return None


def launch_options(
    head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, shared_memory: int = 232448
) -> dict[str, int]:
    """Return the launch options of the kernel from a fixed rule; nothing is tuned at run time.

    The rule keeps sums and scores in registers on sm_90 (seen by compiling), and buffers as much of K and V as fits.

    Args:
        head_dim: size of a head, padded to a power of two by the kernel.
        dtype: dtype of q, k and v.
        block_q: query slots per block.
        block_k: key slots per block.
        shared_memory: bytes of shared memory that a block of threads may use; the default is sm_90's.

    Returns:
        ``num_warps`` and ``num_stages``.
    """
    elements = block_q * (_padded(head_dim) + block_k)
    warps = (4 if elements <= 128 * 128 else 8) * (2 if dtype == torch.float32 else 1)
    stages = _stages(head_dim, dtype, block_q, block_k, shared_memory)
    return {"num_warps": warps, "num_stages": min(3 if dtype != torch.float32 else 2, stages)}


def _stages(head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, shared_memory: int) -> int:
    """Return how many buffers of K and V fit beside q and the weights."""
    size, dim = dtype.itemsize, _padded(head_dim)
    weights = block_q * block_k * size if dtype == torch.float32 else 0
    reserve = 4096  # order tables and scratch of reductions
    return (shared_memory - reserve - block_q * dim * size - weights) // (2 * block_k * dim * size)


def kernel_constants(
    head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, heads: int, *, bias: bool, padded: bool
) -> dict[str, int | bool | str]:
    """Return the compile-time constants of the kernel.

    Args:
        head_dim: size of a head.
        dtype: dtype of q, k and v.
        block_q: query slots per block.
        block_k: key slots per block.
        heads: heads of the layer.
        bias: whether a key bias is given.
        padded: whether the key order holds padding.
    """
    return {
        "HEADS": heads,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": _padded(head_dim),
        "HAS_BIAS": bias,
        "HAS_PADDING": padded,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch one kernel for all heads; see `visparse_kernels.attend` for the arguments.

    Returns:
        ``out [B, Sq, H, D]`` in the dtype of q, and ``lse [B, H, Sq]`` fp32.
    """
    batch, q_len, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    bias = None if key_bias is None else key_bias.float().expand(batch, heads, -1)
    constants = kernel_constants(
        head_dim,
        q.dtype,
        lists.block_q,
        lists.block_k,
        heads,
        bias=bias is not None,
        padded=lists.k_order.shape[1] != lists.k_len,
    )
    with torch.cuda.device_of(q):
        attend_kernel[(lists.n_q, heads, batch)](
            q,
            k,
            v,
            bias,
            out,
            lse,
            lists.head_group,
            lists.q_order,
            lists.k_order,
            lists.full_offsets,
            lists.full_indices,
            lists.partial_offsets,
            lists.partial_indices,
            lists.partial_tiles,
            lists.tiles,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *(bias.stride() if bias is not None else (0, 0, 0)),
            lists.q_order.shape[1] if lists.q_order.shape[0] > 1 else 0,
            lists.k_order.shape[1] if lists.k_order.shape[0] > 1 else 0,
            q_len,
            scale * math.log2(math.e),
            **constants,
            **_options(q, lists),
        )
    return out, lse


def _options(q: Tensor, lists: BlockLists) -> dict[str, int]:
    if q.device.type != "cuda":
        return {}
    limit = max_shared_memory(q.device.index)
    return launch_options(q.shape[-1], q.dtype, lists.block_q, lists.block_k, limit)


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())
