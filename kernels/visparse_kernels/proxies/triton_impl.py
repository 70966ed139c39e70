"""Proxy tokens on CUDA: launches of the Triton kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from visparse_kernels.attend import triton_impl
from visparse_kernels.attend.triton_tuned import Tiling, padded

try:
    from visparse_kernels.proxies.triton_kernel import attend_proxies_kernel, pool_kernel
except ImportError as error:
    _MISSING: str | None = f"needs the triton package, which could not be imported ({error})"
else:
    _MISSING = None

TILE_P = 64  # proxies in a step, where nothing was measured
# head size -> what is fastest on an H200 with 100 to 1,260 proxies, 20 to 37 % over the rule, whose sums take so many
# registers that fewer programs share a multiprocessor; kernels/benchmarks/proxies.py --tilings
_MEASURED = {64: Tiling(64, 128, 4, 1, "table"), 128: Tiling(64, 128, 4, 1, "table")}
_POOLED = 4096  # elements of k, and as many of v, that a program of four warps loads at once


def cannot_pool(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this implementation cannot pool a case, or None."""
    return _MISSING or triton_impl.can_run(device, dtype, 16, 16, 32)


def cannot_attend(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    return _MISSING or triton_impl.can_run(device, dtype, head_dim, block_q, TILE_P)


def tiling(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> Tiling | None:
    """Return how the kernel cuts a case: as was measured on Hopper, else as `attend` cuts blocks of 64 unpadded keys.

    Args:
        device: a CUDA device; in Triton's interpreter the CPU.
        dtype: dtype of q.
        head_dim: size of a head.
        block_q: query slots per block, a multiple of 16.

    Returns:
        The tiling; None where the device has not enough shared memory.
    """
    cut = _MEASURED.get(head_dim)
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
    if cut is not None and hopper and dtype.itemsize == 2 and block_q % cut.tile_q == 0:
        return cut
    return triton_impl.tiling(device, dtype, head_dim, block_q, TILE_P, ragged=False)


def pool(k: Tensor, v: Tensor, members: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted means of the keys and of the values of each proxy; see `reference.pool`."""
    batch, _, heads, head_dim = k.shape
    shape = (batch, members.shape[0], heads, head_dim)
    pooled_k, pooled_v = (torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2))
    with torch.cuda.device_of(k):
        launch_pool(k, v, members, shares, pooled_k, pooled_v)
    return pooled_k, pooled_v


def launch_pool(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    shares: Tensor | None,
    pooled_k: Tensor,
    pooled_v: Tensor,
    *,
    warm_up: bool = False,
) -> Any:
    """Launch the pooling kernel.

    Args:
        k: [B, N, H, D], last axis contiguous; so is v.
        v: [B, N, H, D].
        members: int32 [P, m], -1 padding.
        shares: fp32 [B or 1, H or 1, P, m], or None.
        pooled_k: [B, P, H, D], contiguous, written; so is ``pooled_v``.
        pooled_v: [B, P, H, D].
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    batch, n_proxies, heads, head_dim = pooled_k.shape
    shares = None if shares is None else shares.contiguous()
    arguments = (
        k,
        v,
        members.contiguous(),
        shares,
        pooled_k,
        pooled_v,
        *k.stride()[:3],
        *v.stride()[:3],
        shares.stride(0) if shares is not None and shares.shape[0] > 1 else 0,
        shares.stride(1) if shares is not None and shares.shape[1] > 1 else 0,
        n_proxies,
        members.shape[1],
    )
    dim = padded(head_dim)
    constants = {
        "HEADS": heads,
        "TILE_M": min(_POOLED // dim, 1 << (members.shape[1] - 1).bit_length()),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": dim,
        "HAS_SHARES": shares is not None,
        "num_warps": 4,
    }
    grid = (n_proxies * heads, batch)
    if warm_up:
        return pool_kernel.warmup(*arguments, grid=grid, **constants)
    return pool_kernel[grid](*arguments, **constants)


def attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    scale: float,
    out_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch one kernel for all heads; see `visparse_kernels.proxies.api.attend_proxies` for the arguments.

    Raises:
        ValueError: the case cannot be served; `cannot_attend` says so before.
    """
    cut = tiling(q.device, q.dtype, q.shape[-1], block_q)
    if cut is None:
        raise ValueError(f"q: {cannot_attend(q.device, q.dtype, q.shape[-1], block_q)}")
    new_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    new_lse = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    tables = (hidden, head_group, q_order, block_q, scale)
    with torch.cuda.device_of(q):
        launch_attend(q, out, lse, pooled_k, pooled_v, weight, *tables, new_out, new_lse, cut, out_order=out_order)
    return new_out, new_lse


def launch_attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    scale: float,
    new_out: Tensor,
    new_lse: Tensor,
    cut: Tiling,
    *,
    out_order: Tensor | None = None,
    warm_up: bool = False,
) -> Any:
    """Launch the attention kernel with a given tiling.

    Args:
        q: [B, Sq, H, D], last axis contiguous; so are out, pooled_k and pooled_v.
        out: [B, Sq, H, D].
        lse: fp32 [B, H, Sq].
        pooled_k: [B, P, H, D].
        pooled_v: [B, P, H, D].
        weight: fp32 [B or 1, H or 1, P].
        hidden: int32 [B or 1, G, n_q, words].
        head_group: int32 [H].
        q_order: int32 [G or 1, n_q * block_q].
        block_q: query slots per block.
        scale: factor of the logits.
        new_out: [B, Sq, H, D], contiguous, written.
        new_lse: fp32 [B, H, Sq], contiguous, written.
        cut: the tiling.
        out_order: int32 [1, n_q * block_q], or None.
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    batch, q_len, heads, head_dim = q.shape
    n_proxies = pooled_k.shape[1]
    hidden, q_order = hidden.contiguous(), q_order.contiguous()
    arguments = (
        q,
        out,
        lse.contiguous(),
        pooled_k,
        pooled_v,
        weight,
        hidden,
        head_group.contiguous(),
        q_order,
        None if out_order is None else out_order.contiguous(),
        new_out,
        new_lse,
        *q.stride()[:3],
        *out.stride()[:3],
        *pooled_k.stride()[:3],
        *pooled_v.stride()[:3],
        *weight.expand(batch, heads, -1).stride(),
        hidden.stride(0) if hidden.shape[0] > 1 else 0,
        q_order.shape[1] if q_order.shape[0] > 1 else 0,
        q_len,
        n_proxies,
        hidden.shape[3],
        scale * math.log2(math.e),
    )
    constants = {
        "HEADS": heads,
        "MOVED": out_order is not None,
        "BLOCK_Q": block_q,
        "TILE_Q": cut.tile_q,
        "TILE_P": cut.tile_k,
        "CHUNKS": 1 << (-(-n_proxies // cut.tile_k) - 1).bit_length(),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
    grid = (q_order.shape[1] // cut.tile_q, heads, batch)
    if warm_up:
        return attend_proxies_kernel.warmup(*arguments, grid=grid, **constants)
    return attend_proxies_kernel[grid](*arguments, **constants)
