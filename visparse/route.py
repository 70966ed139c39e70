"""The route of one attention layer: serves each of its calls, sparse or dense, and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.op import compensated_op, register
from visparse.compensation.serve import Compensation
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
        measured: calls that ran dense and measured what later ones reuse.
        compensated: sparse calls of a plan with compensations or selectors, which `served` does not count.
        compensated_density: sum of their block densities.
    """

    served: dict[BlockLists, int] = field(default_factory=dict)
    inputs: tuple[torch.device, torch.dtype] | None = None
    dense: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    sparse_seconds: float = 0.0
    dense_seconds: float = 0.0
    measured: int = 0
    measured_seconds: float = 0.0
    compensated: int = 0
    compensated_density: Tensor | float = 0.0

    @property
    def sparse(self) -> int:
        """Calls served by block lists."""
        return sum(self.served.values()) + self.compensated


class LayerRoute:
    """The route of one attention layer; see `visparse.intercept.Route`."""

    def __init__(self, router: Router, layer: int) -> None:
        """Serve `layer` of the denoiser that `router` belongs to."""
        self.router, self.layer = router, layer
        self.lists: BlockLists | None = None
        self.unserved: str | None = None
        self.stats = LayerStats()
        self.key = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a route of its own."""
        self.__dict__.update(state)
        self.key = register(self)

    def lost(self, reason: str) -> None:
        """Note that this layer's calls no longer come here."""
        self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
        self.router.refuse(reason)

    def attention(self, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool) -> Tensor:
        """Serve one call: sparse where the plan says so and the call allows it, else the original call."""
        router = self.router
        q: Tensor = call["query"]
        if router.compensation is not None:
            return self._compensated(router.compensation, call, dense, heads_first)
        if router.traced is not None:
            lists = router.traced_lists(self.layer, router.traced, q.device)
            why = router.why_dense(router.traced)
        else:
            lists, why = self.lists, router.why
        reason = why if lists is None else self._obstacle(call, lists.q_len, heads_first)
        if reason is not None:
            router.refuse(reason)
        counted = not torch.compiler.is_compiling()
        started = router.now(q.device) if counted else None
        out = dense() if lists is None or reason is not None else self._sparse(call, lists, heads_first)
        if counted:
            seconds = 0.0 if started is None else (router.now(q.device) or started) - started
            self._count(q, lists, reason, seconds)
        return out

    def _compensated(
        self, compensation: Compensation, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool
    ) -> Tensor:
        """Serve one call of a plan with compensations or selectors."""
        router, q = self.router, call["query"]
        if torch.compiler.is_compiling():
            reason = self._obstacle(call, q.shape[2 if heads_first else 1], heads_first)
            if reason is not None:
                router.refuse(reason)
                return dense()
            return compensated_op(
                q, call["key"], call["value"], call.get("attn_mask"), call.get("scale"), heads_first, self.key
            )
        reason = router.why
        if reason is None and router.layout is not None and not router.plan.is_dense_layer(self.layer):
            reason = self._obstacle(call, router.layout.tokens, heads_first)
        if reason is not None:
            router.refuse(reason)
        started = router.now(q.device)
        served = None
        if reason is None:
            if q.device.type == "cpu":
                self._check_finite(q, call["key"], call["value"])
            q, k, v = (call[name].transpose(1, 2) if heads_first else call[name] for name in ("query", "key", "value"))
            served = compensation.serve(self.layer, Call(q, k, v, _key_bias(call.get("attn_mask")), call.get("scale")))
        if served is None:
            out = dense()
        elif heads_first:
            out = served.out.transpose(1, 2)
        else:
            out = served.out
        seconds = 0.0 if started is None else (router.now(q.device) or started) - started
        if served is None:
            self._count(q, None, reason, seconds)
        elif served.density is None:
            self.stats.measured += 1
            self.stats.measured_seconds += seconds
        else:
            self.stats.compensated += 1
            self.stats.compensated_density = self.stats.compensated_density + served.density
            self.stats.sparse_seconds += seconds
            self.stats.inputs = q.device, q.dtype
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

    def _obstacle(self, call: dict[str, Any], wanted: int, heads_first: bool) -> str | None:
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
        if tokens != wanted:
            return f"the sequence has {tokens} tokens, the grid {wanted}"
        if call["value"].shape[-1] != q.shape[-1]:
            return f"values have {call['value'].shape[-1]} channels, queries {q.shape[-1]}"
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
