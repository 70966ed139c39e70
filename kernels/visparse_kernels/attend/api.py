"""`attend`: argument checks, choice of the implementation, registration as a PyTorch operator."""

import math
from types import ModuleType

import torch
from torch import Tensor

from visparse_kernels import env
from visparse_kernels.attend import cpu_impl, gluon_impl, reference, triton_impl
from visparse_kernels.attend.checks import check_arguments, check_finite
from visparse_kernels.boxes import Boxes
from visparse_kernels.eager import is_eager
from visparse_kernels.lists import BlockLists

# in the order in which "auto" tries them
_CANDIDATES: dict[str, ModuleType] = {
    "gluon": gluon_impl,
    "triton": triton_impl,
    "cpu": cpu_impl,
    "reference": reference,
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every head sees only the keys that its block lists keep.

    Inference only. A query that sees nothing gives 0 and a log-sum-exp of -inf. The inputs may have any strides; where
    the last axis is not contiguous, a contiguous copy is made. A non-finite key or value may reach every query that
    visits its block; a non-finite query reaches no other query. Inputs are not searched for NaN, unless the
    environment variable VISPARSE_CHECK is 1.

    Args:
        q: [B, Sq, H, D], fp16, bf16 or fp32 (``reference`` also fp64); D a multiple of 8 up to 256.
        k: [B, Sk, H, D], dtype and device of q.
        v: [B, Sk, H, D], dtype and device of q.
        lists: which key blocks each query block visits, on the device of q.
        scale: factor of the logits, positive; None means 1 / sqrt(D).
        key_bias: [B or 1, H or 1, Sk], any float dtype, added to the scaled logits; -inf hides a key.
        return_lse: also return the log-sum-exp, for `visparse_kernels.merge`.
        impl: ``"reference"``, ``"cpu"``, ``"triton"``, ``"gluon"``, or ``"auto"``: what the variable VISPARSE_IMPL
            names, else the first of gluon, triton, cpu and reference that can serve the case. Asked for by name there
            is no fallback.

    Returns:
        ``out [B, Sq, H, D]``, contiguous, dtype of q; with ``return_lse`` also ``lse [B, H, Sq]``, fp32 (fp64 for fp64
        inputs), natural logarithm.

    Raises:
        ValueError: shapes, devices or sizes do not fit; an input requires grad; or no implementation serves the case.
        TypeError: an argument has the wrong type or dtype.
    """
    check_arguments(q, k, v, lists, scale, key_bias, impl)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if is_eager(q, k, v, key_bias):
        with torch.no_grad():
            out, lse = _run(q, k, v, lists, scale, key_bias, impl)
        return (out, lse) if return_lse else out
    out, lse = attend_op(
        q,
        k,
        v,
        key_bias,
        lists.head_group,
        lists.q_order,
        lists.k_order,
        lists.full_offsets,
        lists.full_indices,
        lists.partial_offsets,
        lists.partial_indices,
        lists.partial_tiles,
        lists.tiles,
        lists.boxes.q_starts if lists.boxes is not None else None,
        lists.boxes.k_starts if lists.boxes is not None else None,
        lists.boxes.numbers if lists.boxes is not None else [],
        lists.block_q,
        lists.block_k,
        scale,
        impl,
    )
    return (out, lse) if return_lse else out


def explain(q: Tensor, lists: BlockLists) -> list[tuple[str, bool, str]]:
    """List every implementation for a case, in the order in which ``impl="auto"`` tries them.

    Args:
        q: [B, Sq, H, D], the queries of the case.
        lists: its block lists.

    Returns:
        ``(name, usable, reason)`` for each; the reason says why it cannot be used, or that it can.
    """
    reasons = {name: _reason(name, q, lists) for name in _CANDIDATES}
    return [(name, reason is None, reason or "can serve this case") for name, reason in reasons.items()]


def choose(q: Tensor, lists: BlockLists, impl: str = "auto") -> str:
    """Return the name of the implementation that `attend` uses for a case.

    Args:
        q: [B, Sq, H, D], the queries of the case.
        lists: its block lists.
        impl: as in `attend`.

    Raises:
        ValueError: the named implementation cannot serve the case; the text lists all of them with their reasons.
    """
    name = env.impl_from_env() if impl == "auto" else impl
    if name == "auto":
        return next(candidate for candidate in _CANDIDATES if _reason(candidate, q, lists) is None)
    if _reason(name, q, lists) is not None:
        every = "; ".join(f"{n}: {reason}" for n, _, reason in explain(q, lists))
        raise ValueError(f"impl: {name!r} cannot serve this case; choose another or impl='auto' ({every})")
    return name


def preferred_blocks(device: torch.device | str, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Return the block sizes that run fastest.

    Args:
        device: where attention will run.
        head_dim: size of a head.
        dtype: of q, k and v.

    Returns:
        ``(block_q, block_k)`` in slots. On the CPU PyTorch's kernel needs 192 queries to work in long strips, and fine
        key blocks cost nothing, since keys are gathered one by one. Blocks of 256 queries are faster where key blocks
        lie at random, and slower for windows, whose masks grow. On Hopper the Gluon kernel takes 64 queries in each
        of two warpgroups, or three where heads are small. On other GPUs 128 x 64 keeps scores and values in registers
        (64 x 64 above a head size of 128).
    """
    if torch.device(device).type == "cpu":
        return 192, 32
    if prefers_boxes(device, head_dim, dtype):
        return gluon_impl.BLOCKS[head_dim]
    return (128, 64) if head_dim <= 128 else (64, 64)


def prefers_boxes(device: torch.device | str, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Say whether lists whose blocks are runs and boxes run faster than any others: where the Gluon kernel serves.

    Args:
        device: where attention will run.
        head_dim: size of a head.
        dtype: of q, k and v.
    """
    blocks = gluon_impl.BLOCKS.get(head_dim)
    return blocks is not None and gluon_impl.can_run(torch.device(device), dtype, head_dim, *blocks) is None


def _reason(name: str, q: Tensor, lists: BlockLists) -> str | None:
    reason: str | None = _CANDIDATES[name].can_run(q.device, q.dtype, q.shape[-1], lists.block_q, lists.block_k)
    if reason is None and name == "gluon":
        reason = gluon_impl.cannot_fetch(lists)
    return reason


def _run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    if env.check_inputs():
        check_finite(q=q, k=k, v=v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    result: tuple[Tensor, Tensor] = _CANDIDATES[choose(q, lists, impl)].run(q, k, v, lists, scale, key_bias)
    return result


@torch.library.custom_op("visparse::attend", mutates_args=())
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    head_group: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    full_offsets: Tensor,
    full_indices: Tensor,
    partial_offsets: Tensor,
    partial_indices: Tensor,
    partial_tiles: Tensor,
    tiles: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    box_numbers: list[int],
    block_q: int,
    block_k: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`attend` in tensors and numbers, as PyTorch's dispatcher and compiler see it."""
    lists = BlockLists(
        q_len=q.shape[1],
        k_len=k.shape[1],
        block_q=block_q,
        block_k=block_k,
        head_group=head_group,
        q_order=q_order,
        k_order=k_order,
        full_offsets=full_offsets,
        full_indices=full_indices,
        partial_offsets=partial_offsets,
        partial_indices=partial_indices,
        partial_tiles=partial_tiles,
        tiles=tiles,
        boxes=Boxes.from_numbers(box_numbers, q_starts, k_starts)
        if q_starts is not None and k_starts is not None
        else None,
    )
    return _run(q, k, v, lists, scale, key_bias, impl)


@attend_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    head_group: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    full_offsets: Tensor,
    full_indices: Tensor,
    partial_offsets: Tensor,
    partial_indices: Tensor,
    partial_tiles: Tensor,
    tiles: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    box_numbers: list[int],
    block_q: int,
    block_k: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, q_len), dtype=lse_dtype)
