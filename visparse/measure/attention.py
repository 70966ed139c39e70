"""Watch or vary the dense attention of a denoiser from outside, with torch's own function mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


class SelfAttentionProbe(TorchFunctionMode):
    """Adds up the time of dense self-attention while it is entered.

    Self-attention is a call of `scaled_dot_product_attention` with as many keys as queries.
    On CUDA each call is waited for, so probe a run that is not itself timed.

    Attributes:
        seconds: time in these calls.
        calls: how many there were.
        shape: `[batch, heads, tokens, head_dim]` of the call with most tokens; None without a call.
    """

    def __init__(self) -> None:
        """Begin with no call."""
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds = 0.0
        self.calls = 0
        self.shape: tuple[int, ...] | None = None

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Passes every call on; times those that are self-attention."""
        kwargs = kwargs or {}
        if function is not _ATTENTION:
            return function(*args, **kwargs)
        query, key = _operand(args, kwargs, 0, "query"), _operand(args, kwargs, 1, "key")
        if query.shape[-2] != key.shape[-2]:
            return function(*args, **kwargs)
        _wait(query)
        begin = time.perf_counter()
        out = function(*args, **kwargs)
        _wait(query)
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        if self.shape is None or query.shape[-2] > self.shape[-2]:
            self.shape = tuple(query.shape)
        return out


class RolledKeys(TorchFunctionMode):
    """Dense attention, equally exact, in another order of addition: the dense-versus-dense floor.

    Softmax attention does not depend on the order of its keys. While this is entered, keys and values of every call
    without mask are rolled by about half their number, together. The result is the same in exact arithmetic, and
    differs in floating point by as much as any other exact implementation would.

    Attributes:
        calls: how many calls were rolled.
    """

    def __init__(self) -> None:
        """Begin with no call."""
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Passes every call on; rolls keys and values where attention has no mask."""
        kwargs = kwargs or {}
        if function is not _ATTENTION or _has_mask(args, kwargs):
            return function(*args, **kwargs)
        operands = [_operand(args, kwargs, index, name) for index, name in enumerate(("query", "key", "value"))]
        shift = (operands[1].shape[-2] // 2) | 1
        rest = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value")}
        self.calls += 1
        return function(operands[0], operands[1].roll(shift, -2), operands[2].roll(shift, -2), *args[3:], **rest)


def amdahl_ceiling(attention_share: float, block_density: float) -> float:
    """The speed-up that is left if sparse attention costs exactly its block density.

    Args:
        attention_share: part of the dense time that is self-attention, 0 to 1.
        block_density: visited blocks over all blocks, 0 to 1.

    Returns:
        Dense time over the best sparse time.

    Raises:
        ValueError: an argument is outside 0 to 1, or nothing would be left to do.
    """
    for name, value in (("attention_share", attention_share), ("block_density", block_density)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: wanted 0 to 1, got {value}")
    rest = 1 - attention_share * (1 - block_density)
    if rest == 0:
        raise ValueError("attention_share: 1 with block_density 0 leaves no work and has no ceiling")
    return 1 / rest


def _operand(args: tuple, kwargs: Mapping[str, Any], index: int, name: str) -> torch.Tensor:
    return args[index] if len(args) > index else kwargs[name]


def _has_mask(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
    return mask is not None or bool(causal)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
