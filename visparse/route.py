"""The route of one attention layer: serves each of its calls, sparse or dense, and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from visparse_kernels import BlockLists, attend
from visparse_kernels.attend.checks import check_finite

if TYPE_CHECKING:
    from visparse.router import Router


@dataclass
class LayerStats:
    """What one layer did in the last run: calls, and seconds where they were measured.

    Attributes:
        served: block lists -> number of calls that they served.
        inputs: device and dtype of the sparse calls; None before the first.
        dense: calls served by the model's own attention.
        fallbacks: reason -> number of calls that ran dense against the plan.
    """

    served: dict[BlockLists, int] = field(default_factory=dict)
    inputs: tuple[torch.device, torch.dtype] | None = None
    dense: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    sparse_seconds: float = 0.0
    dense_seconds: float = 0.0

    @property
    def sparse(self) -> int:
        """Calls served by block lists."""
        return sum(self.served.values())


class LayerRoute:
    """The route of one attention layer; see `visparse.intercept.Route`."""

    def __init__(self, router: Router, layer: int) -> None:
        """Serve `layer` of the denoiser that `router` belongs to."""
        self.router, self.layer = router, layer
        self.lists: BlockLists | None = None
        self.unserved: str | None = None
        self.stats = LayerStats()

    def lost(self, reason: str) -> None:
        """Note that this layer's calls no longer come here."""
        self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
        self.router.refuse(reason)

    def attention(self, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool) -> Tensor:
        """Serve one call: sparse where the plan says so and the call allows it, else the original call."""
        router = self.router
        q: Tensor = call["query"]
        if router.traced is not None:
            lists = router.traced_lists(self.layer, router.traced, q.device)
            why = router.why_dense(router.traced)
        else:
            lists, why = self.lists, router.why
        reason = why if lists is None else self._obstacle(call, lists, heads_first)
        if reason is not None:
            router.refuse(reason)
        counted = not torch.compiler.is_compiling()
        started = router.now(q.device) if counted else None
        out = dense() if lists is None or reason is not None else self._sparse(call, lists, heads_first)
        if counted:
            seconds = 0.0 if started is None else (router.now(q.device) or started) - started
            self._count(q, lists, reason, seconds)
        return out

    def _sparse(self, call: dict[str, Any], lists: BlockLists, heads_first: bool) -> Tensor:
        q, k, v = call["query"], call["key"], call["value"]
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if lists.head_group.device != q.device:
            lists = lists.to(q.device)
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_finite(q, k, v)
        bias = _key_bias(call.get("attn_mask"))
        scale, impl = call.get("scale"), self.router.settings.impl
        out = cast(Tensor, attend(q, k, v, lists, scale=scale, key_bias=bias, impl=impl))
        return out.transpose(1, 2) if heads_first else out

    def _check_finite(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Refuse NaN and infinity. Sums find them in a hundredth of the time of attention; a GPU would have to wait."""
        if all(bool(torch.isfinite(x.sum(dtype=torch.float32))) for x in (q, k, v)):
            return
        try:
            check_finite(q=q, k=k, v=v)
        except ValueError as error:
            self.router.fail(ValueError(f"attention layer {self.layer}: {error}"))

    def _obstacle(self, call: dict[str, Any], lists: BlockLists, heads_first: bool) -> str | None:
        """Why a call cannot be served by block lists; None where it can."""
        q, k = call["query"], call["key"]
        tokens, heads = (q.shape[2], q.shape[1]) if heads_first else (q.shape[1], q.shape[2])
        k_tokens, k_heads = (k.shape[2], k.shape[1]) if heads_first else (k.shape[1], k.shape[2])
        mask = call.get("attn_mask")
        if mask is not None and not _hides_keys(mask, q.shape[0], heads, tokens):
            return f"an attention mask of shape {list(mask.shape)} was passed; [batch, 1, 1, keys] can be served"
        if call.get("is_causal"):
            return "causal attention was asked for"
        if call.get("dropout_p"):
            return "attention dropout was asked for"
        if call.get("attention_kwargs"):
            return "attention_kwargs were passed"
        if call.get("parallel_config") is not None:
            return "context parallelism is on"
        if tokens != k_tokens:
            return f"cross attention ({tokens} queries, {k_tokens} keys)"
        if tokens != lists.q_len:
            return f"the sequence has {tokens} tokens, the grid {lists.q_len}"
        if heads != self.router.model.heads or k_heads != heads:
            return f"the call has {heads} query and {k_heads} key heads, the model {self.router.model.heads}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or call["value"].requires_grad):
            return "gradients are wanted; wrap the call in torch.no_grad()"
        return None

    def _count(self, q: Tensor, lists: BlockLists | None, reason: str | None, seconds: float) -> None:
        stats = self.stats
        if lists is not None and reason is None:
            stats.served[lists] = stats.served.get(lists, 0) + 1
            stats.inputs = q.device, q.dtype
            stats.sparse_seconds += seconds
            return
        stats.dense += 1
        stats.dense_seconds += seconds
        if reason is not None:
            stats.fallbacks[reason] = stats.fallbacks.get(reason, 0) + 1


def _hides_keys(mask: Tensor, batch: int, heads: int, keys: int) -> bool:
    """Whether a mask is the same for all queries: [batch or 1, heads or 1, 1, keys]."""
    return (
        mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and (mask.shape[2], mask.shape[3]) == (1, keys)
    )


def _key_bias(mask: Tensor | None) -> Tensor | None:
    """A mask that is the same for all queries, as `attend` takes it: 0 and -inf for a boolean one."""
    if mask is None:
        return None
    keys = mask[:, :, 0]
    if keys.dtype == torch.bool:
        return torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, -torch.inf)
    return keys
