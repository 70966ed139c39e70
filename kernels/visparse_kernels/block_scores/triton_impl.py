"""`block_scores` on CUDA: copies into slot order, and the launch of the Triton kernel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from visparse_kernels.block_scores.slots import added_to_logits, gather_lse, gather_rows, pad_rows, real_counts
from visparse_kernels.kernels_apply import power

try:
    from visparse_kernels.attend.triton_kernel import INTERPRET, max_shared_memory
    from visparse_kernels.block_scores.triton_kernel import scores_kernel
except ImportError as error:
    _MISSING: str | None = f"needs the triton package, which could not be imported ({error})"
    INTERPRET = False
else:
    _MISSING = None

# fp32 is for the interpreter only: compiled, most tilings spill kilobytes a thread, so `reference` serves it on a GPU
_DTYPES = (torch.float16, torch.float32) if INTERPRET else (torch.float16, torch.bfloat16)
_COPIED = 1 << 29  # bytes of keys in slot order at once
_HOPPER_SHARED_MEMORY = 232448


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the kernel is cut; what is fastest is measured by kernels/benchmarks/block_scores.py.

    Args:
        tile_q: sampled queries per program, a power of two.
        num_warps: warps per program.
        num_stages: key blocks in flight.
        tma: fetch keys by tensor descriptors, not by pointers.
        registers: most per thread, so that two programs fit on a multiprocessor; None: as many as the assembler likes.
    """

    tile_q: int = 128
    num_warps: int = 8
    num_stages: int = 2
    tma: bool = True
    registers: int | None = None


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, rows_q: int, rows_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cuda" and not INTERPRET:
        return f"needs tensors on a CUDA device, got {device.type}"
    if INTERPRET and dtype == torch.bfloat16:
        return "bf16 products are wrong in Triton's interpreter; use fp16 or fp32 there"
    if dtype not in _DTYPES:
        return f"needs bf16 or fp16, got {dtype}"
    if rows_q > 256 or rows_k > 256:
        return f"needs at most 256 sampled queries and 256 keys in a block, got {rows_q} and {rows_k}"
    if variant_for(device, dtype, head_dim, rows_q, rows_k) is None:
        return "needs more shared memory than this device has; use smaller key blocks or fp16"
    return None


def variant_for(device: torch.device, dtype: torch.dtype, head_dim: int, rows_q: int, rows_k: int) -> Variant | None:
    """Return how the kernel is cut for a case; None where the device has not enough shared memory.

    Args:
        device: a CUDA device; the CPU is taken for an sm_90 GPU.
        dtype: dtype of q and k.
        head_dim: size of a head.
        rows_q: sampled queries per query block.
        rows_k: keys per key block.
    """
    shared = max_shared_memory(device.index or 0) if device.type == "cuda" else _HOPPER_SHARED_MEMORY
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    row = power(head_dim) * dtype.itemsize
    for tile_q in (128, 64, 32, 16):
        for stages in (2, 1):
            tile = max(tile_q, power(rows_q))
            cut = Variant(
                tile_q=tile,
                num_warps=8 if tile >= 128 else 4,
                num_stages=stages,
                tma=hopper,
                registers=128 if tile == 128 else None,
            )
            if (tile + stages * power(rows_k)) * row + 4096 <= shared:
                return cut
    return None


def run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    variance: bool,
    cut: Variant | None = None,
) -> Tensor:
    """Copy some heads into slot order and launch the kernel; see `reference.run` for the other arguments.

    Args:
        cut: how the kernel is cut; None: what `variant_for` says.

    Returns:
        fp32 [B, H, n_q, n_k].

    Raises:
        ValueError: the case cannot be served; `can_run` says so before.
    """
    (batch, _, heads, head_dim), n_q, n_k = q.shape, q_rows.shape[0], k_rows.shape[0]
    cut = cut or variant_for(q.device, q.dtype, head_dim, q_rows.shape[1], k_rows.shape[1])
    if cut is None:
        raise ValueError(f"k_rows: {can_run(q.device, q.dtype, head_dim, q_rows.shape[1], k_rows.shape[1])}")
    scores = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=q.device)
    per_head = batch * n_k * power(k_rows.shape[1]) * power(head_dim) * k.element_size()
    step = max(1, _COPIED // per_head)
    with torch.cuda.device_of(q):
        for first in range(0, heads, step):
            some = slice(first, first + step)
            bias = key_bias if key_bias is None or key_bias.shape[1] == 1 else key_bias[:, some]
            part = scores if step >= heads else torch.empty_like(scores[:, some])
            launch(q[:, :, some], k[:, :, some], lse[:, some], part, q_rows, k_rows, bias, scale, variance, cut)
            if part is not scores:
                scores[:, some] = part
    return scores.mul_((math.log(2) ** 2 if variance else 1.0) / real_counts(q_rows)[:, None])


def launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scores: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    variance: bool,
    cut: Variant,
    *,
    warm_up: bool = False,
) -> Any:
    """Launch the kernel for some heads; it writes sums over queries, with logits in units of log2.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        lse: [B, H, Sq].
        scores: fp32 [B, H, n_q, n_k], contiguous, written.
        q_rows: int32 [n_q, w_q], tokens, -1 padding.
        k_rows: int32 [n_k, w_k], the same for keys.
        key_bias: [B or 1, H or 1, Sk], or None.
        scale: factor of the logits.
        variance: as in `reference.run`.
        cut: how the kernel is cut.
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    (batch, _, heads, head_dim), log2e = q.shape, math.log2(math.e)
    # tl.dot needs 16 of each
    rows, tile_k, dim = power(q_rows.shape[1]), max(16, power(k_rows.shape[1])), max(16, power(head_dim))
    q_rows, k_rows = pad_rows(q_rows, rows), pad_rows(k_rows, tile_k)
    (n_q, _), n_k = q_rows.shape, k_rows.shape[0]
    ragged = (k_rows < 0).any(1) if key_bias is None else torch.ones_like(k_rows[:, 0], dtype=torch.bool)
    block_of = ragged.to(torch.int32).argsort(stable=True)
    k_rows = k_rows[block_of]
    added = added_to_logits(key_bias, k_rows, torch.float32).mul_(log2e)
    queries, keys = (_widen(gather_rows(x, table), dim) for x, table in ((q, q_rows), (k, k_rows)))
    arguments = (
        queries,
        _described(keys, tile_k) if cut.tma else keys,
        gather_lse(lse, q_rows, torch.float32).mul_(log2e),
        added,
        block_of.to(torch.int32),
        (~ragged).sum(dtype=torch.int32),
        scores,
        added.stride(0) if added.shape[0] > 1 else 0,
        added.stride(1) if added.shape[1] > 1 else 0,
        n_q,
        n_k,
        scale * log2e,
    )
    constants = {
        "ROWS": rows,
        "TILE_Q": cut.tile_q,
        "TILE_K": tile_k,
        "DIM": dim,
        "VARIANCE": variance,
        "TMA": cut.tma,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
        "maxnreg": cut.registers,
    }
    grid = (-(-n_q * rows // cut.tile_q), heads, batch)
    if warm_up:
        return scores_kernel.warmup(*arguments, grid=grid, **constants)
    return scores_kernel[grid](*arguments, **constants)


def _widen(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def _described(keys: Tensor, tile_k: int) -> Any:
    """Describe keys [B, H, slots, D] to TMA as rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(keys.flatten(0, 2), [tile_k, keys.shape[-1]])
