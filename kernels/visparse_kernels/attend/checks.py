"""Checks of the arguments of `attend`: shapes always, contents on request."""

import math

import torch
from torch import Tensor

from visparse_kernels.env import IMPLS
from visparse_kernels.lists import BlockLists

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float | None, key_bias: Tensor | None, impl: str
) -> None:
    """Raise where an argument of `attend` does not fit; reads no tensor contents.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        v: [B, Sk, H, D].
        lists: block lists for H heads, Sq queries and Sk keys.
        scale: positive and finite, or None.
        key_bias: [B or 1, H or 1, Sk], or None.
        impl: name of an implementation, or "auto".

    Raises:
        ValueError: shapes, devices or sizes do not fit, or an input requires grad.
        TypeError: an argument has the wrong type or dtype.
    """
    if not isinstance(lists, BlockLists):
        raise TypeError(f"lists: wanted BlockLists, got {type(lists).__name__}; build them with BlockLists.from_mask")
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl: wanted one of auto, {', '.join(IMPLS)}, got {impl!r}; use one of these names")
    _check_shapes(q, k, v, lists, key_bias)
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"q, k, v: wanted one dtype of fp16, bf16, fp32 or fp64, got {q.dtype}, {k.dtype} and {v.dtype}; "
            "cast them to one of these"
        )
    devices = {x.device for x in (q, k, v, lists.full_offsets)}
    if key_bias is not None:
        devices.add(key_bias.device)
    if len(devices) > 1:
        raise ValueError(
            f"q, k, v, lists, key_bias: wanted one device, got {', '.join(sorted(map(str, devices)))}; "
            "move the lists with BlockLists.to(device)"
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: wanted a positive finite number, got {scale}; leave it out for 1 / sqrt(head_dim)")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("key_bias", key_bias)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name}: wanted a tensor that needs no gradient, got requires_grad=True; attend is for inference "
                    "only: call it inside torch.no_grad()"
                )


def check_finite(**tensors: Tensor) -> None:
    """Raise where a tensor [B, S, H, D] holds NaN or infinity; reads all of it.

    Args:
        **tensors: the tensors, by the name that an error should give them.

    Raises:
        ValueError: names the tensor, the first bad index and the value there.
    """
    for name, x in tensors.items():
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            index = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: wanted finite values, got {x[tuple(index)].item()} at [b, s, h, d] = "
                f"{index}, {int(bad.sum())} bad in all; look for an overflow before this layer, or use bf16, not fp16"
            )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, key_bias: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v: wanted [batch, tokens, heads, head_dim], got {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}; transpose [batch, heads, tokens, head_dim] with .transpose(1, 2)"
        )
    batch, _, heads, head_dim = q.shape
    if (q.shape[1], heads) != (lists.q_len, lists.heads):
        raise ValueError(
            f"q: wanted {lists.q_len} tokens and {lists.heads} heads, as the lists have, got {q.shape[1]} and {heads}; "
            "compile the lists for this layout, and pass [batch, tokens, heads, head_dim]"
        )
    wanted = (batch, lists.k_len, heads, head_dim)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name}: wanted {list(wanted)} (batch, heads and head_dim of q, {lists.k_len} keys of the lists), "
                f"got {list(x.shape)}; the layout is [batch, tokens, heads, head_dim]"
            )
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(
            f"q, k, v: wanted a head_dim that is a multiple of 8 up to 256, got {head_dim}; pad q, k and v with zeros, "
            "pass scale, and cut the output"
        )
    if key_bias is not None:
        axes = key_bias.shape
        if key_bias.ndim != 3 or axes[0] not in (1, batch) or axes[1] not in (1, heads) or axes[2] != lists.k_len:
            raise ValueError(
                f"key_bias: wanted [{batch} or 1, {heads} or 1, {lists.k_len}], got {list(axes)}; "
                "reshape it to [batch, heads, keys]"
            )
        if not key_bias.is_floating_point():
            raise TypeError(
                f"key_bias: wanted a float tensor that is added to the logits, got {key_bias.dtype}; turn a mask into "
                "0 and -inf"
            )
