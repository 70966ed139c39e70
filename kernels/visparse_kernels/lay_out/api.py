"""`lay_out`: argument checks, and choice of the implementation."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from visparse_kernels.lay_out import reference, triton_impl

# in the order in which "auto" tries them
_CANDIDATES: dict[str, ModuleType] = {"triton": triton_impl, "reference": reference}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InOrder(NamedTuple):
    """What `lay_out` gives. Means are None where they were not asked for; those of no token are 0."""

    q: Tensor  # [B, N, H, D], a view of [B, H, N, D]: the rows of a head lie one behind the other
    k: Tensor
    v: Tensor
    q_mean: Tensor | None  # fp32 [B, H, n_q, D] (fp64 for fp64), of the queries of each block
    k_mean: Tensor | None  # fp32 [B, H, n_k * parts, D], of the keys of each part of a block
    pooled_k: Tensor | None  # [B, n_k * pool, H, D], dtype of k, of the keys of each part that is pooled
    pooled_v: Tensor | None  # the same of the values


def lay_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    block_q: int,
    block_k: int,
    *,
    parts: int = 0,
    pool: int = 0,
    impl: str = "auto",
) -> InOrder:
    """Copy queries, keys and values into the order of their slots, padding left out, and average blocks on the way.

    One pass over memory: what a choice of blocks by pooled scores and proxy tokens need is made of the rows while they
    are copied. Sums are fp32. Inference only; any strides.

    Args:
        q: [B, N, H, D], fp16, bf16 or fp32 (``reference`` also fp64).
        k: [B, N, H, D], dtype and device of q.
        v: [B, N, H, D], dtype and device of q.
        q_order: int32 [n_q * block_q], slot -> token, -1 padding; every token in exactly one slot. Do not change it:
            what is found of a table is kept.
        k_order: int32 [n_k * block_k], the same for keys.
        block_q: query slots per block.
        block_k: key slots per block.
        parts: runs of slots, equally long, that a key block is cut into for ``k_mean``, a divisor of ``block_k``; 0:
            neither ``k_mean`` nor ``q_mean`` is wanted.
        pool: the same for ``pooled_k`` and ``pooled_v``; 0: neither is wanted.
        impl: ``"reference"``, ``"triton"``, or ``"auto"``: the first of triton and reference that can serve the case.

    Returns:
        Copies and means, see `InOrder`.

    Raises:
        ValueError: shapes, devices or sizes do not fit; an input requires grad; or the implementation that is named
            cannot serve the case.
        TypeError: an argument has the wrong dtype.
    """
    _check(q, k, v, q_order, k_order, block_q, block_k, parts, pool, impl)
    why = {name: module.can_run(q.device, q.dtype, block_q, block_k) for name, module in _CANDIDATES.items()}
    name = next(name for name, reason in why.items() if reason is None) if impl == "auto" else impl
    if why[name] is not None:
        raise ValueError(f"impl: {name!r} cannot serve this case ({why[name]}); choose another or impl='auto'")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return InOrder(*_CANDIDATES[name].run(q, k, v, q_order, k_order, block_q, block_k, parts, pool))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    block_q: int,
    block_k: int,
    parts: int,
    pool: int,
    impl: str,
) -> None:
    if impl not in ("auto", *_CANDIDATES):
        raise ValueError(f"impl: wanted one of auto, {', '.join(_CANDIDATES)}, got {impl!r}; use one of these names")
    if q.ndim != 4:
        raise ValueError(f"q: wanted [batch, tokens, heads, head_dim], got {list(q.shape)}; transpose or unflatten it")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: wanted fp16, bf16, fp32 or fp64, got {q.dtype}; cast it to one of these")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name}: wanted the shape of q, {list(q.shape)}, got {list(x.shape)}; pass self-attention"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: wanted {q.dtype} as q has, got {x.dtype}; cast it")
    for name, order, block in (("q_order", q_order, block_q), ("k_order", k_order, block_k)):
        if order.dtype != torch.int32:
            raise TypeError(f"{name}: wanted an int32 tensor, got {order.dtype}; cast it with .to(torch.int32)")
        if order.ndim != 1 or block < 1 or len(order) % block or len(order) < q.shape[1]:
            raise ValueError(
                f"{name}: wanted [blocks * {block}] slots that hold {q.shape[1]} tokens, got {list(order.shape)}; pass "
                "the order and the block size of the same tiles"
            )
    for name, number in (("parts", parts), ("pool", pool)):
        if number < 0 or (number and block_k % number):
            raise ValueError(f"{name}: wanted 0 or a divisor of block_k = {block_k}, got {number}; choose a power of 2")
    for name, x in (("k", k), ("v", v), ("q_order", q_order), ("k_order", k_order)):
        if x.device != q.device:
            raise ValueError(f"{name}: wanted the device of q, {q.device}, got {x.device}; move it there")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: wanted a tensor that needs no gradient, got requires_grad=True; lay_out is for inference "
                "only: call it inside torch.no_grad()"
            )
