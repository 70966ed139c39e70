"""Router: decides, call by call, how each attention layer of one denoiser is served."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from visparse.compensation.serve import Compensation
from visparse.compile import compile_lists, orders_of
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.route import LayerRoute, LayerStats
from visparse.rules import ModelFingerprint
from visparse.settings import Settings
from visparse.steps import Clock
from visparse_kernels import BlockLists, preferred_blocks, prefers_boxes

_KEPT_LAYOUTS = 8


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
        self.proven = False  # whether a call of the denoiser has come through with sparse attention in it
        self.undo: Callable[[], object] | None = None
        self.orders: dict[Layout, set[str]] = {}  # in words, of the sparse heads
        self._cache: dict[Any, list[BlockLists | None]] = {}
        self.compensation = Compensation(self) if plan.is_compensated else None
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
            if self.compensation is not None:
                raise RuntimeError(
                    "a plan with compensations or selectors changes from step to step, which a compiled denoiser "
                    "cannot tell here; compile first and sparsify the compiled denoiser, or compile its blocks "
                    "(compile_repeated_blocks)"
                )
            if self.plan.needs_steps and not self.clock.given:
                raise RuntimeError(
                    "the plan depends on the step, which a compiled denoiser cannot tell here; compile first and "
                    "sparsify the compiled denoiser, or use a plan with dense_steps=0"
                )
            self.traced = layout
            return
        started = time.perf_counter()
        try:
            if self.plan.needs_steps:
                self.clock.tick(timestep)
            self.follow_run()
            self.layout, self.why = layout, self.why_dense(layout)
            if self.compensation is not None:
                self.compensation.begin(layout, device)
                return
            served = self.lists(layout, device)
        except ValueError as error:
            self.fail(error)
        for route, lists in zip(self.routes, served, strict=True):
            route.lists = lists
        self.list_seconds += time.perf_counter() - started

    def end(self, completed: bool) -> None:
        """The call is over, by return (`completed`) or by exception."""
        self.traced = None
        if self.compensation is not None and not torch.compiler.is_compiling():
            self.compensation.end()
        if completed and not self.proven:
            self.proven = any(route.stats.sparse or route.stats.measured for route in self.routes)

    def follow_run(self) -> None:
        """Set counts and times to zero where a new run has begun, also in another denoiser of the pipeline.

        Raises:
            ValueError: the run cannot be served as planned; see `SparsePlan.check_run`.
        """
        if self.clock.runs == self._run:
            return
        self._run = self.clock.runs
        if self.plan.needs_steps and self.clock.step is not None:
            all_dense = self.plan.check_run(self.clock.total, self.clock.sigmas)
            if all_dense is not None and all_dense not in self._warned:
                self._warned.add(all_dense)
                warnings.warn(f"visparse: {all_dense}", RuntimeWarning, stacklevel=2)
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
            if self.why_dense(layout) is None:
                self.plan.check_grid(self.model, layout.grid, self.clock.total, self.clock.sigmas)
            while len(self._cache) >= _KEPT_LAYOUTS:
                self._cache.pop(next(iter(self._cache)))
            layers = range(self.model.layers)
            self._cache[key] = [self.layer_lists(layer, layout, stage, device) for layer in layers]
        return self._cache[key]

    @property
    def stage(self) -> int | None:
        """The plan's present stage; None where the plan needs the step and it is not known."""
        return self.clock.stage if self.plan.needs_steps else 0

    @property
    def next_stage(self) -> int:
        """The plan's stage at the next step."""
        if not self.plan.needs_steps:
            return 0
        return self.plan.stage((self.clock.step or 0) + 1, self.clock.total, self.clock.sigmas)

    def layer_lists(self, layer: int, layout: Layout, stage: int | None, device: torch.device) -> BlockLists | None:
        """Block lists of one layer; None where the plan wants it dense or cannot be followed.

        Args:
            layer: index of the layer.
            layout: of the tokens.
            stage: see `stage`.
            device: where the lists go.
        """
        if stage is None or self.off_grid(layout) is not None:
            return None
        names = self.plan.names(layer, self.model.heads, stage)
        if names is None:
            return None
        patterns = [self.plan.patterns[name].resolve(layout.grid) for name in names]
        how = self.list_settings(device)
        orders = orders_of(patterns, layout, **how)
        self.orders.setdefault(layout, set()).update(str(order) for order in orders if order is not None)
        return compile_lists(patterns, layout, **how)

    def list_settings(self, device: torch.device) -> dict[str, Any]:
        """How `compile_lists` is called.

        Args:
            device: where the lists go.
        """
        settings, preferred = self.settings, preferred_blocks(device, self.model.head_dim)
        blocks = settings.block_q or preferred[0], settings.block_k or preferred[1]
        fetched = settings.impl in ("auto", "gluon") and blocks == preferred and settings.order in ("auto", "row-major")
        return {
            "block_q": blocks[0],
            "block_k": blocks[1],
            "order": settings.order,
            "boxes": fetched and prefers_boxes(device, self.model.head_dim),
            "device": device,
        }

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

    def fail(self, error: ValueError) -> NoReturn:
        """Raise an error of bad input. Where no call has been served sparsely yet, everything comes off first.

        So a mistake in a plan leaves nothing patched, and one bad request does not end a plan that works.

        Raises:
            ValueError: always.
        """
        if self.proven or self.undo is None:
            raise error
        self.undo()
        raise ValueError(f"{error} (nothing had run sparsely yet, so visparse has restored the model)") from error

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do not undo what is installed on the original."""
        return {**self.__dict__, "undo": None}

    def off_grid(self, layout: Layout) -> str | None:
        """Why the plan is not for this grid; None where it is."""
        if self.plan.grids is None or layout.grid in self.plan.grids:
            return None
        return f"grid {layout.grid} is not one of the plan's grids"

    def now(self, device: torch.device) -> float | None:
        """Seconds on the clock once the device's work is done; None on an accelerator where `timing` is off."""
        if device.type != "cpu":
            if not self.settings.timing:
                return None
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def why_dense(self, layout: Layout) -> str | None:
        """Why the plan cannot be followed in the present call, whatever the layer; None where it can."""
        return self.off_grid(layout) or ("the step is not known" if self.stage is None else None)
