"""Checks of the arguments of `pool_tokens` and `attend_proxies`: shapes and types, never contents."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("reference", "cpu", "triton")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pool(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    key_bias: Tensor | None,
    query: Tensor | None,
    counts: Tensor | None,
    scale: float | None,
    impl: str,
) -> None:
    """Raise where an argument of `pool_tokens` does not fit; reads no tensor contents.

    Raises:
        ValueError: shapes, devices or sizes do not fit, or an input requires grad.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_impl(impl)
    _check_rows(k=k, v=v)
    batch, length, heads, head_dim = k.shape
    rows = (batch, length, heads, head_dim)
    _check_shape("v", v, rows, "it has the shape of k")
    if query is not None:
        _check_shape("query", query, rows, "pass the queries of the same tokens, unpooled")
    _check_table("members", members, 2)
    if members.shape[0] < 1 or members.shape[1] < 1:
        raise ValueError(
            f"members: wanted [proxies, tokens of a proxy], at least one of each, got {list(members.shape)}; "
            "leave the call out where nothing is pooled"
        )
    if key_bias is not None:
        _check_shape("key_bias", key_bias, ((1, batch), (1, heads), length), "reshape it to [batch, heads, keys]")
        _check_float("key_bias", key_bias, "turn a mask into 0 and -inf")
    if counts is not None:
        _check_shape("counts", counts, (members.shape[0],), "give one number of tokens for each proxy")
        if counts.dtype == torch.bool or counts.is_complex():
            raise TypeError(f"counts: wanted int or float numbers of tokens, got {counts.dtype}; cast it to float32")
    _check_same(k, v=v, query=query)
    _check_device(k, "k", v=v, members=members, key_bias=key_bias, query=query, counts=counts)
    _check_scale(scale)
    _check_grad("pool_tokens", k=k, v=v, key_bias=key_bias, query=query, counts=counts)


def check_attend(
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
    out_order: Tensor | None,
    scale: float | None,
    impl: str,
) -> None:
    """Raise where an argument of `attend_proxies` does not fit; reads no tensor contents.

    Raises:
        ValueError: shapes, devices or sizes do not fit, or an input requires grad.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_impl(impl)
    _check_rows(q=q, out=out, pooled_k=pooled_k, pooled_v=pooled_v)
    batch, length, heads, head_dim = q.shape
    n_proxies = pooled_k.shape[1]
    if n_proxies < 1:
        raise ValueError("pooled_k: wanted at least one proxy, got none; leave the call out where nothing is pooled")
    _check_shape("out", out, (batch, length, heads, head_dim), "pass the output of attend for these queries")
    _check_shape("lse", lse, (batch, heads, length), "pass the log-sum-exp of attend(..., return_lse=True)")
    proxies = (batch, n_proxies, heads, head_dim)
    _check_shape("pooled_k", pooled_k, proxies, "pass what pool_tokens returns for the keys of these queries")
    _check_shape("pooled_v", pooled_v, proxies, "it has the shape of pooled_k")
    _check_shape("weight", weight, ((1, batch), (1, heads), n_proxies), "pass what pool_tokens returns")
    _check_same(q, out=out, pooled_k=pooled_k, pooled_v=pooled_v)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x in (("lse", lse), ("weight", weight)):
        if x.dtype != wide:
            raise TypeError(f"{name}: wanted {wide} beside q in {q.dtype}, got {x.dtype}; leave it as it was returned")
    _check_table("hidden", hidden, 4)
    _check_table("head_group", head_group, 1)
    _check_table("q_order", q_order, 2)
    _check_shape("head_group", head_group, (heads,), "give each head its group, -1 for a skipped head")
    if block_q < 1 or q_order.shape[1] % block_q or q_order.shape[1] < length:
        raise ValueError(
            f"q_order, block_q: wanted a multiple of block_q = {block_q} slots that hold {length} tokens, got "
            f"{q_order.shape[1]} slots; pass q_order and block_q of the block lists"
        )
    groups, n_q = hidden.shape[1], q_order.shape[1] // block_q
    words = -(-n_proxies // 32)
    _check_shape("hidden", hidden, ((1, batch), groups, n_q, words), "pack one bit for each proxy into int32 words")
    _check_shape("q_order", q_order, ((1, groups), n_q * block_q), "give one order for all groups, or one for each")
    if out_order is not None:
        _check_table("out_order", out_order, 2)
        _check_shape("out_order", out_order, (1, n_q * block_q), "give a place for each slot of q_order")
        _check_shape("q_order", q_order, (1, n_q * block_q), "with out_order all groups share one order")
    tables = {"out_order": out_order, "weight": weight, "hidden": hidden, "head_group": head_group, "q_order": q_order}
    _check_device(q, "q", out=out, lse=lse, pooled_k=pooled_k, pooled_v=pooled_v, **tables)
    _check_scale(scale)
    _check_grad("attend_proxies", q=q, out=out, lse=lse, pooled_k=pooled_k, pooled_v=pooled_v, weight=weight)


def _check_impl(impl: str) -> None:
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl: wanted one of auto, {', '.join(IMPLS)}, got {impl!r}; use one of these names")


def _check_rows(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(
                f"{name}: wanted [batch, tokens, heads, head_dim], got {list(x.shape)}; transpose "
                "[batch, heads, tokens, head_dim] with .transpose(1, 2)"
            )
        if x.shape[3] % 8 or not 8 <= x.shape[3] <= 256:
            raise ValueError(
                f"{name}: wanted a head_dim that is a multiple of 8 up to 256, got {x.shape[3]}; pad q, k and v with "
                "zeros, pass scale, and cut the output"
            )
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: wanted fp16, bf16, fp32 or fp64, got {x.dtype}; cast it to one of these")


def _check_shape(name: str, x: Tensor, wanted: Sequence[int | tuple[int, int]], advice: str) -> None:
    fits = x.ndim == len(wanted) and all(
        size in choice if isinstance(choice, tuple) else size == choice
        for size, choice in zip(x.shape, wanted, strict=True)
    )
    if not fits:
        said = ", ".join(f"{c[0]} or {c[1]}" if isinstance(c, tuple) else str(c) for c in wanted)
        raise ValueError(f"{name}: wanted shape [{said}], got {list(x.shape)}; {advice}")


def _check_table(name: str, x: Tensor, axes: int) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: wanted an int32 tensor, got {x.dtype}; cast it with .to(torch.int32)")
    if x.ndim != axes:
        raise ValueError(f"{name}: wanted {axes} axes, got shape {list(x.shape)}; see the docstring for what they are")


def _check_float(name: str, x: Tensor, advice: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: wanted a float tensor that is added to the logits, got {x.dtype}; {advice}")


def _check_same(first: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype != first.dtype:
            raise TypeError(f"{name}: wanted {first.dtype} as the first argument has, got {x.dtype}; cast it")


def _check_device(first: Tensor, word: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name}: wanted the device of {word}, {first.device}, got {x.device}; move it there")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: wanted a positive finite number, got {scale}; leave it out for 1 / sqrt(head_dim)")


def _check_grad(call: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: wanted a tensor that needs no gradient, got requires_grad=True; {call} is for inference "
                "only: call it inside torch.no_grad()"
            )
