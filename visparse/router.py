"""Router: decides, call by call, how each attention layer of one denoiser is served."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from visparse.compile import compile_lists
from visparse.errors import nearest
from visparse.layout import Layout
from visparse.plan import ModelFingerprint, SparsePlan
from visparse.steps import Clock
from visparse_kernels import BlockLists, attend, preferred_blocks
from visparse_kernels.env import IMPLS

_KEPT_LAYOUTS = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is run.

    Attributes:
        impl: implementation of `visparse_kernels.attend`; a name other than "auto" never falls back.
        block_q, block_k: block sizes in slots; None: what the kernels prefer on the device.
        order: token order: "auto", "row-major" or a tile (frames, height, width).
        strict: raise where a layer or call cannot be served, instead of running it dense with a recorded reason.
        timing: measure time in attention on CUDA too, which waits for the device at each call. On CPU it is always on.
    """

    impl: str = "auto"
    block_q: int | None = None
    block_k: int | None = None
    order: str | tuple[int, int, int] = "auto"
    strict: bool = False
    timing: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before there is a grid."""
        known = ("auto", *IMPLS)
        if self.impl not in known:
            raise ValueError(
                f"impl must be one of {', '.join(known)}, got {self.impl!r}{nearest(str(self.impl), known)}"
            )
        for name, unit in (("block_q", 1), ("block_k", 32)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1 or value % unit):
                raise ValueError(
                    f"{name} must be a positive multiple of {unit}, or None for the default; got {value!r}"
                )
        tile = (
            isinstance(self.order, tuple) and len(self.order) == 3 and all(type(n) is int and n > 0 for n in self.order)
        )
        if self.order not in ("auto", "row-major") and not tile:
            raise ValueError(f"order must be 'auto', 'row-major' or a tile such as (4, 8, 8), got {self.order!r}")


@dataclass
class LayerStats:
    """What one layer did in the last run: calls, and seconds where they were measured."""

    sparse: int = 0
    dense: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    sparse_seconds: float = 0.0
    dense_seconds: float = 0.0


class Router:
    """State of one sparsified denoiser; knows no module, so that processors that hold it can be copied and pickled."""

    def __init__(self, plan: SparsePlan, model: ModelFingerprint, settings: Settings, clock: Clock) -> None:
        """Serve `model` by `plan`."""
        self.plan, self.model, self.settings, self.clock = plan, model, settings, clock
        self.routes = [LayerRoute(self, layer) for layer in range(model.layers)]
        self.layout: Layout | None = None
        self.traced: Layout | None = None
        self.why: str | None = None
        self.held = SimpleNamespace()
        self.denoiser_seconds = 0.0
        self.list_seconds = 0.0
        self._cache: dict[Any, list[BlockLists | None]] = {}
        self._run = 0
        self._warned: set[str] = set()

    def begin(self, layout: Layout, timestep: object, device: torch.device) -> None:
        """A call of the denoiser begins: find the step and hand every layer its block lists.

        Args:
            layout: of the tokens that its self-attention sees.
            timestep: the denoiser's timestep argument; read only where the plan needs the step and nothing else
                gives it.
            device: of its inputs.

        Raises:
            ValueError: a pattern does not fit the grid, or a share of steps is asked for and their number is not known.
        """
        if torch.compiler.is_compiling():
            if self.plan.needs_steps and not self.clock.given:
                raise RuntimeError(
                    "the plan depends on the step, which a compiled denoiser cannot tell here; compile first and "
                    "sparsify the compiled denoiser, or use a plan with dense_steps=0"
                )
            self.traced = layout
            return
        if self.plan.needs_steps:
            self.clock.tick(timestep)
        if self.clock.runs != self._run:
            self._run = self.clock.runs
            self.reset_statistics()
        started = time.perf_counter()
        self.layout, self.why = layout, self.why_dense(layout)
        for route, lists in zip(self.routes, self.lists(layout, device), strict=True):
            route.lists = lists
        self.list_seconds += time.perf_counter() - started

    def end(self) -> None:
        """The call is over, by return or by exception."""
        self.traced = None

    def reset_statistics(self) -> None:
        """Set counts and times of all layers to zero."""
        self.denoiser_seconds = self.list_seconds = 0.0
        for route in self.routes:
            route.stats = LayerStats()

    def lists(self, layout: Layout, device: torch.device) -> list[BlockLists | None]:
        """Block lists of every layer at the clock's present stage; None for a dense layer.

        Raises:
            ValueError: a pattern does not fit the grid.
        """
        stage = self.stage
        key = (layout, stage, device)
        if key not in self._cache:
            while len(self._cache) >= _KEPT_LAYOUTS:
                self._cache.pop(next(iter(self._cache)))
            layers = range(self.model.layers)
            self._cache[key] = [self.layer_lists(layer, layout, stage, device) for layer in layers]
        return self._cache[key]

    @property
    def stage(self) -> int | None:
        """The plan's present stage; None where the plan needs the step and it is not known."""
        return self.clock.stage if self.plan.needs_steps else 0

    def layer_lists(self, layer: int, layout: Layout, stage: int | None, device: torch.device) -> BlockLists | None:
        """Block lists of one layer; None where the plan wants it dense or cannot be followed.

        Args:
            layer: index of the layer.
            layout: of the tokens.
            stage: see `stage`.
            device: where the lists go.
        """
        if stage is None or not self._covers(layout):
            return None
        names = self.plan.names(layer, self.model.heads, stage)
        if names is None:
            return None
        preferred = preferred_blocks(device, self.model.head_dim)
        return compile_lists(
            [self.plan.patterns[name].resolve(layout.grid) for name in names],
            layout,
            block_q=self.settings.block_q or preferred[0],
            block_k=self.settings.block_k or preferred[1],
            order=self.settings.order,
            device=device,
        )

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def hold(
        self,
        layer: int,
        frames: int,
        height: int,
        width: int,
        before: int,
        after: int,
        stage: int,
        device: torch.device,
    ) -> str:
        """Make the block lists of a layer while torch.compile traces, and keep them in `held` for the graph.

        Returns:
            Name of the attribute of `held`; a constant of the graph.
        """
        name = f"layer{layer}_{frames}x{height}x{width}_{before}_{after}_{stage}_{device}"
        layout = Layout((frames, height, width), before, after)
        setattr(self.held, name, self.layer_lists(layer, layout, stage, device))
        return name

    def traced_lists(self, layer: int, layout: Layout, device: torch.device) -> BlockLists | None:
        """Block lists of a layer, in code that torch.compile traces: sizes become constants of the graph."""
        stage = self.stage
        if stage is None:
            return None
        sizes = [operator.index(size) for size in (*layout.grid, layout.before, layout.after)]
        lists: BlockLists | None = getattr(self.held, self.hold(layer, *sizes, stage, device))
        return lists

    def refuse(self, reason: str) -> None:
        """Note that a call runs dense against the plan: raise if strict, else warn once per reason.

        Raises:
            RuntimeError: the handle is strict.
        """
        if self.settings.strict:
            raise RuntimeError(f"strict: a layer cannot be served sparsely: {reason}")
        if reason not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(reason)
            warnings.warn(f"visparse: runs dense against the plan: {reason}", RuntimeWarning, stacklevel=2)

    def _covers(self, layout: Layout) -> bool:
        return self.plan.grids is None or layout.grid in self.plan.grids

    def now(self, device: torch.device) -> float | None:
        """Seconds on the clock once the device's work is done; None on an accelerator where `timing` is off."""
        if device.type != "cpu":
            if not self.settings.timing:
                return None
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def why_dense(self, layout: Layout) -> str | None:
        """Why the plan cannot be followed in the present call, whatever the layer; None where it can."""
        if not self._covers(layout):
            return f"grid {layout.grid} is not one of the plan's grids"
        if self.stage is None:
            return "the step is not known"
        return None


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
            self._count(lists is not None and reason is None, reason, seconds)
        return out

    def _sparse(self, call: dict[str, Any], lists: BlockLists, heads_first: bool) -> Tensor:
        q, k, v = call["query"], call["key"], call["value"]
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if lists.head_group.device != q.device:
            lists = lists.to(q.device)
        out = cast(Tensor, attend(q, k, v, lists, scale=call.get("scale"), impl=self.router.settings.impl))
        return out.transpose(1, 2) if heads_first else out

    def _obstacle(self, call: dict[str, Any], lists: BlockLists, heads_first: bool) -> str | None:
        """Why a call cannot be served by block lists; None where it can."""
        q, k = call["query"], call["key"]
        tokens, heads = (q.shape[2], q.shape[1]) if heads_first else (q.shape[1], q.shape[2])
        k_tokens, k_heads = (k.shape[2], k.shape[1]) if heads_first else (k.shape[1], k.shape[2])
        if call.get("attn_mask") is not None:
            return "an attention mask was passed"
        if call.get("is_causal"):
            return "causal attention was asked for"
        if call.get("dropout_p"):
            return "attention dropout was asked for"
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

    def _count(self, sparse: bool, reason: str | None, seconds: float) -> None:
        if sparse:
            self.stats.sparse += 1
            self.stats.sparse_seconds += seconds
            return
        self.stats.dense += 1
        self.stats.dense_seconds += seconds
        if reason is not None:
            self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
