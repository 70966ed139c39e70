"""Checks of the arguments of `block_scores`; they read no tensor contents."""

import math

import torch
from torch import Tensor

KINDS = ("mass", "mass_variance", "pooled")
IMPLS = ("auto", "reference", "cpu", "triton")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    q_order: Tensor,
    k_order: Tensor,
    block_q: int,
    block_k: int,
    kind: str,
    sample: int,
    key_bias: Tensor | None,
    scale: float | None,
    impl: str,
) -> None:
    """Raise where an argument of `block_scores` does not fit; see there for what they are.

    Raises:
        ValueError: a shape, a device, a size or a name does not fit.
        TypeError: an argument has the wrong dtype.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {kind!r}; use one of these names")
    if impl not in IMPLS:
        raise ValueError(f"impl: wanted one of {', '.join(IMPLS)}, got {impl!r}; use one of these names")
    if kind == "pooled" and impl != "auto":
        raise ValueError(f"impl: wanted 'auto' for pooled scores, which have one form, got {impl!r}; leave it out")
    _check_inputs(q, k)
    for name, order, block in (("q_order", q_order, block_q), ("k_order", k_order, block_k)):
        _check_order(name, order, block)
    if sample < 1 or block_q % sample:
        raise ValueError(
            f"sample: wanted a divisor of block_q = {block_q}, got {sample}; use 1 for every query of a block"
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: wanted a positive finite number, got {scale}; leave it out for 1 / sqrt(head_dim)")
    _check_statistics(q, k, lse, kind, key_bias)
    devices = {x.device for x in (q, k, q_order, k_order, lse, key_bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"q, k, lse, q_order, k_order, key_bias: wanted one device, got {', '.join(sorted(map(str, devices)))}; "
            "move all of them with .to(device)"
        )


def check_parts(kind: str, block_k: int, parts: int) -> None:
    """Raise where key blocks cannot be cut.

    Args:
        kind: of the scores.
        block_k: key slots per block.
        parts: of a key block.

    Raises:
        ValueError: the number is no divisor, or parts are asked for where there are none.
    """
    if parts < 1 or block_k % parts:
        raise ValueError(f"parts: wanted a divisor of block_k = {block_k}, got {parts}; 1 cuts nothing")
    if parts > 1 and kind != "pooled":
        raise ValueError(f"parts: wanted 1 for kind={kind!r}, which looks at every key, got {parts}; leave it out")


def _check_inputs(q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q, k: wanted [batch, tokens, heads, head_dim] with one batch, heads and head_dim, got {list(q.shape)} "
            f"and {list(k.shape)}; transpose [batch, heads, tokens, head_dim] with .transpose(1, 2)"
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        raise TypeError(
            f"q, k: wanted one dtype of fp16, bf16, fp32 or fp64, got {q.dtype} and {k.dtype}; cast both to one"
        )


def _check_order(name: str, order: Tensor, block: int) -> None:
    if order.dtype != torch.int32:
        raise TypeError(f"{name}: wanted an int32 tensor, got {order.dtype}; convert it with .to(torch.int32)")
    if block < 1 or order.ndim != 1 or order.shape[0] == 0 or order.shape[0] % block:
        raise ValueError(
            f"{name}: wanted one axis of a positive multiple of block_{name[0]} = {block} slots, got "
            f"{list(order.shape)}; pad the table with -1, and give the row of one group"
        )


def _check_statistics(q: Tensor, k: Tensor, lse: Tensor | None, kind: str, key_bias: Tensor | None) -> None:
    batch, q_len, heads, _ = q.shape
    if kind != "pooled":
        if lse is None:
            raise ValueError(
                f"lse: wanted the log-sum-exp of dense attention for kind={kind!r}, got None; take it from "
                "attend(..., return_lse=True), or use kind='pooled'"
            )
        if tuple(lse.shape) != (batch, heads, q_len) or not lse.is_floating_point():
            raise ValueError(
                f"lse: wanted floats [{batch}, {heads}, {q_len}] (batch, heads, queries), got {lse.dtype} "
                f"{list(lse.shape)}; it is the natural log-sum-exp that attend returns"
            )
    if key_bias is not None:
        axes = tuple(key_bias.shape)
        right = len(axes) == 3 and axes[0] in (1, batch) and axes[1] in (1, heads) and axes[2] == k.shape[1]
        if not right or not key_bias.is_floating_point():
            raise ValueError(
                f"key_bias: wanted floats [{batch} or 1, {heads} or 1, {k.shape[1]}], got {key_bias.dtype} "
                f"{list(axes)}; reshape it to [batch, heads, keys], and turn a mask into 0 and -inf"
            )
