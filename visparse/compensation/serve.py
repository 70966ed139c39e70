"""Serve: how a layer runs under a plan with compensations or selectors, call by call.

Each call of a layer is one of three: *dense*; *measured* (dense, and what later steps reuse is measured on the way);
or *sparse*. What is reused must fit the call and be of the step that the plan wants, else the call is measured again:
a stale measurement is never used.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from visparse.compensation.call import Call, Served, unfolded
from visparse.compensation.choice import Choice, choose_by_content, choose_tiles
from visparse.compensation.laid_out import Laid, LaidOut, laid_out, pays
from visparse.compensation.overlap import overlaps
from visparse.compensation.proxy_table import pool, proxy_table
from visparse.compensation.refresh import Overlap
from visparse.compensation.residuals import Residuals
from visparse.compensation.state import BranchState, apply_rho, block_means, ramp, rho_of
from visparse.compensation.tiles import Tiles, tiles_of_plan
from visparse.compensation.watch import Watch
from visparse.compile import compile_lists
from visparse.layout import Layout
from visparse.patterns import Dense, Pattern, Selector, Skip, TopP
from visparse_kernels import BlockLists, attend, attend_proxies, preferred_blocks
from visparse_kernels import prefers_boxes as boxes_are_faster

if TYPE_CHECKING:
    from visparse.router import Router

_KEPT_LAYOUTS = 8
_KEPT = ("states", "_resolved", "_static", "_fixed", "_densities")  # by layout, or of a run


class Compensation:
    """Serves the layers of one denoiser whose plan has compensations or selectors."""

    def __init__(self, router: Router) -> None:
        """Serve for a router.

        Raises:
            ValueError: the plan's residual does not fit the model.
        """
        self.router = router
        self.states: dict[tuple[Hashable, int], BranchState] = {}  # by branch and layer
        self.residuals = None
        plan, model = router.plan, router.model
        if plan.residual is not None:
            layers = sum(not plan.is_dense_layer(layer) for layer in range(model.layers))
            self.residuals = Residuals(plan.residual, layers, model.head_dim)
        self.watch = None if plan.overlap is None else Watch(plan.overlap)
        router.clock.keepers.append(self)
        self._resolved: dict[tuple[tuple[str, ...], Layout], tuple[Pattern, ...]] = {}
        self._static: dict[tuple[Layout, Pattern, torch.device], Tensor] = {}
        self._fixed: dict[tuple[Layout, tuple[Pattern, ...], torch.device], Choice] = {}
        self._densities: dict[tuple[Layout, tuple[Pattern, ...], torch.device], Tensor] = {}
        self.example: BlockLists | None = None  # lists of a sparse call, to report what serves them
        self._checked: set[tuple[Layout, int | None]] = set()
        self._run = 0
        self._step: int | None = None
        self._calls = 0

    # ---- calls of the denoiser ---------------------------------------------------------------------------------------

    def begin(self, layout: Layout, device: torch.device) -> None:
        """A call of the denoiser begins.

        Args:
            layout: of its tokens.
            device: of its inputs.

        Raises:
            ValueError: a pattern or the tiles do not fit the grid.
        """
        clock = self.router.clock
        if clock.runs != self._run:
            self._run, self._step = clock.runs, None
            self.states.clear()
            if self.watch is not None:
                self.watch.begin_run()
        if self.watch is not None and clock.step is not None and clock.step != self._step:
            self.watch.begin_step(clock.step, self.router.plan.timetable(clock.total, clock.sigmas))
        self._calls = self._calls + 1 if clock.step == self._step else 0
        self._step = clock.step
        for other in clock.keepers:
            other.rest(clock.step)
        if (layout, clock.total) not in self._checked and self.router.why_dense(layout) is None:
            self._check(layout, device)

    def end(self) -> None:
        """A call of the denoiser is over; with the last one of a run its branch keeps nothing."""
        if self.router.clock.last:
            for key in [key for key in self.states if key[0] == self.branch]:
                del self.states[key]

    def rest(self, step: int | None) -> None:
        """Free all states where this denoiser rests, as after a switch to the pipeline's other one.

        Args:
            step: at which a denoiser of the pipeline begins a call; None: not known, or the run is over.
        """
        if self._step is None or step is None or not 0 <= step - self._step <= 1:
            self.states.clear()
            if self.watch is not None:
                self.watch.drop()

    def _check(self, layout: Layout, device: torch.device) -> None:
        """Refuse what does not fit the grid before the first dense step is paid for."""
        plan, total = self.router.plan, self.router.clock.total
        plan.check_grid(self.router.model, layout.grid, total, self.router.clock.sigmas)
        if plan.proxies is not None:
            proxy_table(self._tiles(layout, device), plan.proxies)
        elif plan.selectors or (plan.statistics is not None and plan.statistics.storage == "block"):
            self._tiles(layout, device)
        if len({kept for kept, _ in self._checked} | {layout}) > _KEPT_LAYOUTS:
            self.clear()
        self._checked.add((layout, total))

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles begin without anything that was measured."""
        watch = None if self.watch is None else Watch(self.watch.rule)
        return {**self.__dict__, **{name: {} for name in _KEPT}, "example": None, "watch": watch}

    def clear(self) -> None:
        """Forget everything that is kept."""
        self.example = None
        for name in (*_KEPT, "_checked"):
            getattr(self, name).clear()
        if self.residuals is not None:
            self.residuals.clear()

    @property
    def branch(self) -> Hashable:
        """The pass of guidance: its name where the pipeline gives one, else its number within the step."""
        name = self.router.clock.branch
        return self._calls if name is None else name

    @property
    def nbytes(self) -> int:
        """Bytes of all states on the device."""
        return sum(state.nbytes for state in self.states.values())

    # ---- calls of a layer --------------------------------------------------------------------------------------------

    def serve(self, layer: int, call: Call) -> Served | None:
        """Serve one call.

        Args:
            layer: index of the layer.
            call: its arguments.

        Returns:
            The output, and what it cost; None where the model's own attention is wanted.

        Raises:
            ValueError: the residual would not fit into memory.
        """
        router, clock, layout = self.router, self.router.clock, cast(Layout, self.router.layout)
        step = clock.step or 0
        if self.residuals is not None:
            try:
                self.residuals.check(layout, call.q)
            except ValueError as error:
                router.fail(error)
        names = router.plan.names(layer, router.model.heads, cast(int, router.stage))
        coming = names or router.plan.names(layer, router.model.heads, router.next_stage)
        if coming is None:
            return None
        patterns = self._patterns(coming, layout)
        due = {what: self._due(what, step) for what in self._items(coming, patterns)}
        if names is None and step not in due.values():
            return None
        state = self._state(layer, call, layout, coming) if due else BranchState(None)
        stale = [what for what, wanted in due.items() if state.measured.get(what) != wanted]
        if any(due[what] is None for what in stale):
            return None
        if stale or names is None:
            return Served(self._measure(call, layout, coming, patterns, state, due, stale), None)
        if self.watch is not None and self.watch.looking:
            chosen = None if state.choice is None else state.choice.chosen
            if chosen is not None:
                tiles = self._tiles(layout, call.q.device)
                self.watch.note(overlaps(call, tiles, layer, coming, patterns, chosen, router.settings.impl))
        return Served(*self._sparse(call, layout, coming, patterns, state, step))

    def _patterns(self, names: tuple[str, ...], layout: Layout) -> tuple[Pattern, ...]:
        """The patterns of the heads on a grid."""
        if (names, layout) not in self._resolved:
            table = self.router.plan.patterns
            known = {name: table[name].resolve(layout.grid) for name in dict.fromkeys(names)}
            self._resolved[names, layout] = tuple(known[name] for name in names)
        return self._resolved[names, layout]

    def _due(self, what: str, step: int) -> int | None:
        """For which step something must have been measured; None: for none yet."""
        plan, clock = self.router.plan, self.router.clock
        wanted = plan.measured_at(what, step, clock.total, clock.sigmas)
        if wanted is None or self.watch is None or not isinstance(plan.refreshes[what], Overlap):
            return wanted
        return self.watch.latest(wanted)

    def _items(self, names: tuple[str, ...], patterns: tuple[Pattern, ...]) -> list[str]:
        """What is reused in a layer."""
        plan = self.router.plan
        items = [name for name in ("statistics", "residual") if getattr(plan, name) is not None]
        reused = (name for name, p in zip(names, patterns, strict=True) if isinstance(p, Selector) and p.reused)
        return [*items, *dict.fromkeys(reused)]

    def _state(self, layer: int, call: Call, layout: Layout, names: tuple[str, ...]) -> BranchState:
        fits = (self._run, layout, tuple(call.q.shape), call.q.dtype, call.q.device, names)
        key = (self.branch, layer)
        if key not in self.states or self.states[key].fits != fits:
            self.states[key] = BranchState(fits)
        return self.states[key]

    def _measure(
        self,
        call: Call,
        layout: Layout,
        names: tuple[str, ...],
        patterns: tuple[Pattern, ...],
        state: BranchState,
        due: dict[str, int | None],
        stale: list[str],
    ) -> Tensor:
        """Run dense, and measure what is stale; a new choice of tiles makes all the rest stale."""
        out, lse = self._attend(call, self._all(layout, call))
        if any(what not in ("statistics", "residual") for what in stale):
            stale = list(due)
            tiles = self._tiles(layout, call.q.device)
            chosen = choose_by_content(call, tiles, names, patterns, lse, None)
            state.choice = self._choice(layout, patterns, chosen, call.q.device)
        elif "statistics" in stale:  # the residual is what the scaled output lacks
            stale = list({*stale, *({"residual"} & set(due))})
        if "statistics" in stale or "residual" in stale:
            sparse, sparse_lse, _ = self._exact_and_proxies(call, layout, patterns, state)
            if "statistics" in stale:
                state.log_rho = self._log_rho(rho_of(sparse_lse, lse), layout, call.q.device)
                state.sparse_steps, state.last_step = 0, None
            if "residual" in stale and self.residuals is not None:
                state.residual = None
                state.residual = self.residuals.store(out - self._scaled(sparse, state, layout, 0.0), layout)
        state.measured |= {what: due[what] for what in stale}  # type: ignore[misc]
        return out

    def _sparse(
        self,
        call: Call,
        layout: Layout,
        names: tuple[str, ...],
        patterns: tuple[Pattern, ...],
        state: BranchState,
        step: int,
    ) -> tuple[Tensor, Tensor | float]:
        laid = self._lay(call, layout, patterns)
        if any(isinstance(pattern, Selector) and not pattern.reused for pattern in patterns):
            kept = None if state.choice is None else state.choice.chosen
            tiles = self._tiles(layout, call.q.device)
            chosen = choose_by_content(call, tiles, names, patterns, None, kept, laid)
            state.choice = self._choice(layout, patterns, chosen, call.q.device)
        if state.residual is not None:
            state.residual.prefetch()
        out, _, density = self._exact_and_proxies(call, layout, patterns, state, laid)
        statistics = self.router.plan.statistics
        out = self._scaled(out, state, layout, 0.0 if statistics is None else ramp(statistics, state, step))
        return out if state.residual is None else state.residual.add_to(out), density

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _lay(self, call: Call, layout: Layout, patterns: tuple[Pattern, ...]) -> Laid | None:
        """The call in the order of its tiles, with the means that a sparse call needs; None where that does not pay."""
        laid_out, _ = self._laid(layout, call.q.device)
        if laid_out is None or not self._tiled(patterns):
            return None
        fresh = [one.parts for one in patterns if isinstance(one, Selector) and not one.reused]
        proxies = self.router.plan.proxies
        pool = proxies.per_tile if proxies is not None and proxies.kind == "mean" else 0
        return laid_out.lay(call, max(fresh, default=0), pool)

    def _exact_and_proxies(
        self,
        call: Call,
        layout: Layout,
        patterns: tuple[Pattern, ...],
        state: BranchState,
        laid: Laid | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Output and log-sum-exp of what is seen exactly and by proxy, and the block density."""
        proxies = self.router.plan.proxies
        if not self._tiled(patterns):
            lists = self._lists(layout, patterns, call.q.device)
            return *self._attend(call, lists), lists.block_density
        choice = state.choice or self._choice(layout, patterns, None, call.q.device)
        laid_out, tiles = self._laid(layout, call.q.device)
        laid = laid or self._lay(call, layout, patterns)
        came, call = call, call if laid is None else laid.call
        if choice.rows == 1:
            out, lse = self._attend(call, choice.lists)
        else:
            out, lse = unfolded(*self._attend(call.folded(), choice.lists), choice.rows)
        if choice.hidden is not None and proxies is not None:
            if laid is not None and laid.pooled is not None:
                pooled = pool(call, proxy_table(tiles, proxies), proxies.kind, laid.pooled)
            else:  # from the tokens as they came: agents need the queries of each tile of keys
                pooled = pool(came, proxy_table(self._tiles(layout, came.q.device), proxies), proxies.kind)
            out, lse = attend_proxies(
                call.q,
                out,
                lse,
                *pooled,
                choice.hidden,
                choice.head_group,
                tiles.q_order[None],
                tiles.block_q,
                out_order=None if laid_out is None else laid_out.source.q_order[None],
                scale=call.scale,
            )
        elif laid_out is not None:
            out, lse = laid_out.put_back(out, lse)
        return out, lse, choice.density

    def _choice(
        self, layout: Layout, patterns: tuple[Pattern, ...], chosen: Tensor | None, device: torch.device
    ) -> Choice:
        """Lists of a layer; those by position alone are kept."""
        key = (layout, patterns, device)
        if chosen is None and key in self._fixed:
            return self._fixed[key]
        (_, tiles), proxies = self._laid(layout, device), self.router.plan.proxies
        static = {p: self._widened(layout, p, device) for p in patterns if not isinstance(p, (Selector, Skip))}
        table = None if proxies is None else proxy_table(tiles, proxies)
        choice = choose_tiles(tiles, patterns, chosen, static, table, self._densities.get(key))
        if chosen is None:
            self._fixed[key] = choice
        if not any(isinstance(pattern, TopP) for pattern in patterns):  # all others keep equally many every time
            self._densities[key] = choice.density
        return choice

    def _widened(self, layout: Layout, pattern: Pattern, device: torch.device) -> Tensor:
        key = (layout, pattern, device)
        if key not in self._static:
            self._static[key] = self._tiles(layout, device).widen(pattern)
        return self._static[key]

    def _tiled(self, patterns: tuple[Pattern, ...]) -> bool:
        """Whether tiles are seen whole: there are proxies, or tiles are chosen."""
        return self.router.plan.proxies is not None or any(isinstance(pattern, Selector) for pattern in patterns)

    def _tiles(self, layout: Layout, device: torch.device) -> Tiles:
        plan, model, settings = self.router.plan, self.router.model, self.router.settings
        blocks = {"block_q": settings.block_q, "block_k": settings.block_k}
        return tiles_of_plan(plan, layout, model.head_dim, device, **blocks)

    def _laid(self, layout: Layout, device: torch.device) -> tuple[LaidOut | None, Tiles]:
        """How tensors are laid out for the tiles of a sparse call, if at all, and the tiles as they lie then."""
        tiles = self._tiles(layout, device)
        laid = laid_out(tiles) if pays(tiles) else None
        return laid, tiles if laid is None else laid.tiles

    def _lists(self, layout: Layout, patterns: tuple[Pattern, ...], device: torch.device) -> BlockLists:
        """Lists with the patterns' own masks; `compile_lists` keeps them."""
        return compile_lists(patterns, layout, **self.router.list_settings(device))

    def _all(self, layout: Layout, call: Call) -> BlockLists:
        """Lists of dense attention."""
        device, head_dim = call.q.device, call.q.shape[3]
        block_q, block_k = preferred_blocks(device, head_dim, call.q.dtype)
        boxes = boxes_are_faster(device, head_dim, call.q.dtype)
        return compile_lists(
            (Dense(),) * call.q.shape[2],
            Layout((1, 1, layout.tokens)),
            block_q=block_q,
            block_k=block_k,
            order="row-major",
            boxes=boxes,
            device=device,
        )

    def _attend(self, call: Call, lists: BlockLists) -> tuple[Tensor, Tensor]:
        q, k, v, bias, scale = call
        self.example = lists
        out, lse = attend(q, k, v, lists, scale=scale, key_bias=bias, return_lse=True, impl=self.router.settings.impl)
        return out, lse

    def _log_rho(self, log_rho: Tensor, layout: Layout, device: torch.device) -> Tensor:
        if self.router.plan.statistics is not None and self.router.plan.statistics.storage == "block":
            tiles = self._tiles(layout, device)
            log_rho = block_means(log_rho, tiles.block_of(), tiles.n_q)
        return log_rho.to(torch.float16)

    def _scaled(self, out: Tensor, state: BranchState, layout: Layout, added: float) -> Tensor:
        if state.log_rho is None or self.router.plan.statistics is None:
            return out
        by_block = self.router.plan.statistics.storage == "block"
        return apply_rho(out, state.log_rho, added, self._tiles(layout, out.device).block_of() if by_block else None)
