"""`attend` on CUDA: launch of the Triton kernel for all heads, groups and batch rows at once."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from visparse_kernels.attend.triton_tuned import Tiling, find_tiling, padded
from visparse_kernels.lists import BlockLists

try:
    from visparse_kernels.attend.triton_kernel import INTERPRET, attend_kernel, max_shared_memory
except ImportError as error:
    _MISSING: str | None = f"needs the triton package, which could not be imported ({error})"
    INTERPRET = False
else:
    _MISSING = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if block_q % 16 or block_k % 32:
        return f"needs block_q to be a multiple of 16 and block_k of 32, got {block_q} and {block_k}"
    if tiling(device, dtype, head_dim, block_q, block_k) is None:
        limit = max_shared_memory(device.index or 0)
        return f"needs more than the {limit} bytes of shared memory of this device; use a smaller head_dim or fp16"
    return None


@cache
def tiling(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int, ragged: bool = True
) -> Tiling | None:
    """Return how the kernel cuts the blocks of a case, and whether that was measured or comes from the rule.

    Args:
        device: a CUDA device; in Triton's interpreter the CPU, which is taken for an sm_90 GPU.
        dtype: dtype of q, k and v.
        head_dim: size of a head.
        block_q: query slots per block, a multiple of 16.
        block_k: key slots per block, a multiple of 32.
        ragged: whether the key order holds padding.

    Returns:
        The tiling; None where the device has not enough shared memory.
    """
    if device.type != "cuda":
        return find_tiling(head_dim, dtype, block_q, block_k, ragged=ragged)
    return find_tiling(
        head_dim,
        dtype,
        block_q,
        block_k,
        ragged=ragged,
        capability=torch.cuda.get_device_capability(device),
        shared_memory=max_shared_memory(device.index or 0),
    )


def is_ragged(lists: BlockLists) -> bool:
    """Say whether the key order may hold padding.

    Keys of boxes may lie in several slots or in none, so there the number of slots says nothing.
    """
    return lists.boxes is not None or lists.k_order.shape[1] != lists.k_len


def run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch one kernel for all heads; see `visparse_kernels.attend` for the arguments.

    Returns:
        ``out [B, Sq, H, D]`` in the dtype of q, and ``lse [B, H, Sq]`` fp32.

    Raises:
        ValueError: the case cannot be served; `can_run` says so before.
    """
    batch, q_len, heads, head_dim = q.shape
    cut = tiling(q.device, q.dtype, head_dim, lists.block_q, lists.block_k, is_ragged(lists))
    if cut is None:
        raise ValueError(f"lists: {can_run(q.device, q.dtype, head_dim, lists.block_q, lists.block_k)}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        launch(q, k, v, out, lse, lists, scale, key_bias, cut)
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    scale: float,
    key_bias: Tensor | None,
    cut: Tiling,
    *,
    warm_up: bool = False,
) -> Any:
    """Launch the kernel with a given tiling.

    Args:
        q: [B, Sq, H, D], last axis contiguous; so are k and v.
        k: [B, Sk, H, D].
        v: [B, Sk, H, D].
        out: [B, Sq, H, D], contiguous, written.
        lse: [B, H, Sq], fp32, contiguous, written.
        lists: the block lists.
        scale: factor of the logits.
        key_bias: [B or 1, H or 1, Sk], or None.
        cut: the tiling.
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    batch, q_len, heads, head_dim = q.shape
    bias = None if key_bias is None else key_bias.float().expand(batch, heads, -1)
    arguments = (
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
    )
    constants = {
        "HEADS": heads,
        "BLOCK_Q": lists.block_q,
        "BLOCK_K": lists.block_k,
        "TILE_Q": cut.tile_q,
        "TILE_K": cut.tile_k,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "HAS_BIAS": bias is not None,
        "HAS_PADDING": is_ragged(lists),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
    grid = (lists.q_order.shape[1] // cut.tile_q, heads, batch)
    if warm_up:
        return attend_kernel.warmup(*arguments, grid=grid, **constants)
    return attend_kernel[grid](*arguments, **constants)
