"""Report: what was served sparsely, what was not and why, how dense it was, and whether it can pay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from visparse.devices import execution_device
from visparse.layout import Layout
from visparse.plan import SparsePlan

if TYPE_CHECKING:
    from visparse.route import LayerRoute, LayerStats
    from visparse.router import Router
    from visparse.session import Session
    from visparse_kernels import BlockLists

_POOR_CEILING = 1.1


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One attention layer in the last run.

    Attributes:
        layer: index.
        state: "sparse", "dense" (by the plan) or "not served"; "unknown" before any run.
        why: reason where it is not sparse.
        density: kept pairs / all pairs, mean over heads and sparse calls; None where not known.
        block_density: visited blocks / all blocks, mean over heads and sparse calls; None where not known.
        sparse_calls, dense_calls: calls served by block lists, and by the model's own attention.
        fallbacks: reason -> number of calls that ran dense against the plan.
        measured_calls: those of the dense calls that measured what later ones reuse.
    """

    layer: int
    state: str
    why: str | None
    density: float | None
    block_density: float | None
    sparse_calls: int
    dense_calls: int
    fallbacks: dict[str, int]
    measured_calls: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One denoiser in the last run.

    Attributes:
        component: name in the pipeline.
        model_class: its class.
        grid, tokens: of the last call, or those asked for; None before any run.
        steps: steps of the run; None where not known.
        dense_steps: dense steps at its start; None where not known.
        runs: runs seen since `sparsify`; 0 where nothing tells runs apart.
        step_source: "cache context", "timestep" or None.
        impl: implementation of `attend` that serves the sparse layers; None where there is none.
        impl_reasons: candidate -> why it can or cannot serve them.
        orders: token orders of their heads, in words.
        denoiser_seconds: time in the denoiser; None where it was not measured.
        attention_seconds: time in its self-attention; None where it was not measured. A report for a grid that was
            asked for has no times, no calls and no fallbacks.
        list_seconds: time spent on making block lists; those of a plan with selectors are made inside attention.
        state_bytes: memory that compensations keep on the device between steps at present; None without any.
        refreshed_at: steps of the last run that were measured again since the overlap had fallen.
        overlaps: step -> overlap that was found there; empty where the plan does not go by it.
        attention_share: share of a dense step that self-attention would take; needs one dense and measured call.
        efficiency: (time of a dense call x block density) / time of a sparse call; 1 is ideal.
        ceiling: the speed-up of the denoiser if the sparse calls had efficiency 1.
        speedup: the speed-up of the denoiser against all-dense as its times say.
        layers: one entry per layer.
    """

    component: str
    model_class: str
    grid: tuple[int, int, int] | None
    tokens: int | None
    steps: int | None
    dense_steps: int | None
    runs: int
    step_source: str | None
    impl: str | None
    impl_reasons: dict[str, str]
    orders: tuple[str, ...]
    denoiser_seconds: float | None
    attention_seconds: float | None
    list_seconds: float
    state_bytes: int | None
    refreshed_at: tuple[int, ...]
    overlaps: dict[int, float]
    attention_share: float | None
    efficiency: float | None
    ceiling: float | None
    speedup: float | None
    layers: tuple[LayerReport, ...]

    @property
    def density(self) -> float | None:
        """Mean density of the layers that run sparsely; None where there is none."""
        return _mean([layer.density for layer in self.layers if layer.state == "sparse"])

    @property
    def block_density(self) -> float | None:
        """Mean block density of the layers that run sparsely; None where there is none."""
        return _mean([layer.block_density for layer in self.layers if layer.state == "sparse"])

    @property
    def warning(self) -> str | None:
        """A warning where sparsity cannot pay at this size."""
        if self.ceiling is None or self.ceiling >= _POOR_CEILING or self.block_density is None:
            return None
        return (
            f"little to gain at this size: self-attention takes {self.attention_share:.0%} of a dense step, so this "
            f"plan can make the denoiser at most {self.ceiling:.2f} times faster"
        )


@dataclass(frozen=True)
class Report:
    """What visparse does on a pipeline; `str()` is a table for people, `to_dict()` is JSON."""

    plan: SparsePlan
    models: tuple[ModelReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "models": [
                asdict(model)
                | {"density": model.density, "block_density": model.block_density, "warning": model.warning}
                | {
                    "grid": None if model.grid is None else list(model.grid),
                    "layers": [asdict(x) for x in model.layers],
                }
                for model in self.models
            ],
        }

    def __str__(self) -> str:
        """Plan, then a table per denoiser."""
        return "\n\n".join([self.plan.describe(), *(_table(model) for model in self.models)])


def make_report(plan: SparsePlan, sessions: Mapping[str, Session], grid: tuple[int, int, int] | None) -> Report:
    """Gather the report of all sessions of a target; `grid` as in `visparse.report`."""
    return Report(plan, tuple(_model_report(name, session, grid) for name, session in sessions.items()))


def _model_report(name: str, session: Session, grid: tuple[int, int, int] | None) -> ModelReport:
    from visparse.route import LayerStats  # here, so that `import visparse` stays light

    router, clock = session.router, session.router.clock
    router.follow_run()
    layout, why, lists = router.layout, router.why, [route.lists for route in router.routes]
    stats = [route.stats for route in router.routes]
    if grid is not None:
        layout = Layout(grid=grid)
        why = router.off_grid(layout)
        lists, stats = _preview(session, layout), [LayerStats() for _ in stats]
    tiled: list[float | None] = [None] * len(stats)
    if grid is not None and layout is not None and router.compensation is not None and why is None:
        tiled = _preview_tiles(session, layout)
    layers = tuple(
        _layer_report(route, counts, entry, share, layout is not None, why)
        for route, counts, entry, share in zip(router.routes, stats, lists, tiled, strict=True)
    )
    impl, reasons = _impl(session, stats, lists)
    watch = None if router.compensation is None else router.compensation.watch
    return ModelReport(
        component=name,
        model_class=router.model.model_class,
        grid=None if layout is None else layout.grid,
        tokens=None if layout is None else layout.tokens,
        steps=clock.total,
        dense_steps=_dense_steps(router),
        runs=clock.runs,
        step_source=clock.source,
        impl=impl,
        impl_reasons=reasons,
        orders=() if layout is None else tuple(sorted(router.orders.get(layout, ()))),
        list_seconds=router.list_seconds,
        state_bytes=None if router.compensation is None else router.compensation.nbytes,
        refreshed_at=() if watch is None or grid is not None else tuple(watch.refreshed),
        overlaps={} if watch is None or grid is not None else dict(watch.overlaps),
        layers=layers,
        **_times(router.denoiser_seconds, stats, layers),
    )


def _at_last_stage(session: Session) -> tuple[Router, int, torch.device]:
    """The router, the plan's last stage, and the denoiser's device."""
    router = session.router
    stage = router.plan.last_stage(router.clock.total or 1, router.clock.sigmas)
    return router, stage, execution_device(session.module)


def _preview(session: Session, layout: Layout) -> list[BlockLists | None]:
    """Block lists of the plan's last stage; a share of steps needs no number of steps there."""
    router, stage, device = _at_last_stage(session)
    return [router.layer_lists(layer, layout, stage, device) for layer in range(router.model.layers)]


def _preview_tiles(session: Session, layout: Layout) -> list[float | None]:
    """Block density of each layer at the plan's last stage, where its heads see whole tiles; else None."""
    from visparse.compensation.preview import tiled_density  # here, so that `import visparse` stays light

    router, stage, device = _at_last_stage(session)
    return [tiled_density(router, layer, layout, stage, device) for layer in range(router.model.layers)]


def _layer_report(
    route: LayerRoute,
    stats: LayerStats,
    lists: BlockLists | None,
    tiled: float | None,
    known: bool,
    off: str | None,
) -> LayerReport:
    counted = (
        stats.sparse or stats.dense or stats.measured or stats.fallbacks
    )  # not before a run, and not in compiled code
    served = stats.served if counted or lists is None else {lists: 1}
    state, why = "sparse", None
    if route.unserved is not None:
        state, why = "not served", route.unserved
    elif not known:
        state, why = "unknown", "no run yet; ask for a grid: report(pipe, grid=(frames, height, width))"
    elif not served and not stats.compensated and stats.fallbacks:
        state, why = "not served", next(iter(stats.fallbacks))
    elif not served and not stats.compensated:
        state = "dense"
        why = "dense layer" if route.router.plan.is_dense_layer(route.layer) else off or "dense pattern or step"
    density, block_density = (1.0, 1.0) if state == "dense" else (None, None)
    if tiled is not None and route.unserved is None:
        state, why, density, block_density = "sparse", None, tiled, tiled
    elif state == "sparse" and stats.compensated:
        density = block_density = float(stats.compensated_density) / stats.compensated
    elif state == "sparse":
        density, block_density = _over_calls(served, "density"), _over_calls(served, "block_density")
    return LayerReport(
        layer=route.layer,
        state=state,
        why=why,
        density=density,
        block_density=block_density,
        sparse_calls=stats.sparse,
        dense_calls=stats.dense + stats.measured,
        fallbacks=dict(stats.fallbacks),
        measured_calls=stats.measured,
    )


def _over_calls(served: Mapping[BlockLists, int], name: str) -> float:
    return sum(getattr(lists, name) * calls for lists, calls in served.items()) / sum(served.values())


def _dense_steps(router: Router) -> int | None:
    try:
        return router.plan.first_sparse_step(router.clock.total, router.clock.sigmas)
    except ValueError:  # a share, and no run has told the number of steps
        return None


def _impl(
    session: Session, stats: list[LayerStats], lists: list[BlockLists | None]
) -> tuple[str | None, dict[str, str]]:
    """The implementation that serves the sparse layers, and every candidate's reason."""
    from visparse_kernels import choose, explain  # here, so that `import visparse` stays light

    seen = [(entry, counts.inputs) for counts in stats for entry in counts.served]
    compensation = session.router.compensation
    if compensation is not None and compensation.example is not None:
        seen = [(compensation.example, next((counts.inputs for counts in stats if counts.inputs), None))]
    sparse, inputs = next(iter(seen or [(entry, None) for entry in lists if entry is not None]), (None, None))
    if sparse is None:
        return None, {}
    # before any call: the attention's own weights, since other parts of a denoiser may be kept in float32
    weights, model = next(session.sites[0][1].layer.parameters()), session.router.model
    device, dtype = inputs or (execution_device(session.module), weights.dtype)
    q = torch.empty(1, 1, model.heads, model.head_dim, device=device, dtype=dtype)
    return choose(q, sparse, session.router.settings.impl), {name: why for name, _, why in explain(q, sparse)}


def _times(total: float, stats: list[LayerStats], layers: tuple[LayerReport, ...]) -> dict[str, float | None]:
    """Times and what follows from them; see `ModelReport`."""
    sparse_seconds, dense_seconds = sum(s.sparse_seconds for s in stats), sum(s.dense_seconds for s in stats)
    sparse_calls, dense_calls = sum(s.sparse for s in stats), sum(s.dense for s in stats)
    measured_calls = sum(s.measured for s in stats)
    attention = sparse_seconds + dense_seconds + sum(s.measured_seconds for s in stats)
    times: dict[str, float | None] = dict.fromkeys(
        ("denoiser_seconds", "attention_seconds", "attention_share", "efficiency", "ceiling", "speedup")
    )
    if not total or not attention:
        return times
    times |= {"denoiser_seconds": total, "attention_seconds": attention}
    if not dense_calls:
        return times
    per_dense = dense_seconds / dense_calls
    all_dense = per_dense * (sparse_calls + dense_calls + measured_calls)
    everything = total - attention + all_dense
    share = all_dense / everything
    visited = sum(layer.sparse_calls * (layer.block_density or 0.0) for layer in layers)
    dense_calls += measured_calls
    cost = (visited + dense_calls) / (sparse_calls + dense_calls)
    times |= {"attention_share": share, "ceiling": 1 / (1 - share + share * cost), "speedup": everything / total}
    if sparse_calls:
        times["efficiency"] = per_dense * visited / sparse_seconds
    return times


def _table(model: ModelReport) -> str:
    grid = "no run yet" if model.grid is None else f"grid {'x'.join(map(str, model.grid))} = {model.tokens} tokens"
    lines = [f"{model.component} ({model.model_class}): {grid}"]
    if model.impl is not None:
        reasons = "; ".join(f"{name}: {why}" for name, why in model.impl_reasons.items())
        lines.append(f"  attend runs as {model.impl!r} ({reasons})")
    if model.orders:
        lines.append(f"  token order: {'; '.join(model.orders)}")
    if model.steps is not None:
        lines.append(f"  {model.steps} steps, the first {model.dense_steps} dense (step from the {model.step_source})")
    lines.append(f"  {'layer':>5}  {'state':<10}  {'density':>8}  {'blocks':>8}  {'sparse':>7}  {'dense':>7}  why")
    lines += [_row(layer) for layer in model.layers]
    for x in model.layers:
        lines += [
            f"  layer {x.layer}: {count} calls ran dense against the plan: {why}" for why, count in x.fallbacks.items()
        ]
    if model.denoiser_seconds is not None:
        lines.append(f"  {model.attention_seconds:.2f} s of {model.denoiser_seconds:.2f} s in self-attention")
    if model.overlaps:
        step, least = min(model.overlaps.items(), key=lambda found: found[1])
        again = (
            f"measured again at {', '.join(map(str, model.refreshed_at))}"
            if model.refreshed_at
            else "none measured again"
        )
        lines.append(f"  overlap looked at in {len(model.overlaps)} steps, least {least:.0%} in step {step}; {again}")
    if model.state_bytes:
        lines.append(f"  {model.state_bytes / 2**20:.0f} MiB are kept between steps")
    if model.ceiling is not None:
        lines.append(
            f"  attention is {_percent(model.attention_share)} of a dense step; ceiling {model.ceiling:.2f}x, "
            f"measured {model.speedup:.2f}x"
            + ("" if model.efficiency is None else f", efficiency {model.efficiency:.2f}")
        )
    elif model.denoiser_seconds is not None:
        lines.append("  ceiling: not known, no dense call was timed; use dense_steps=1 or more once")
    if model.warning:
        lines.append(f"  warning: {model.warning}")
    return "\n".join(lines)


def _row(x: LayerReport) -> str:
    numbers = f"{_percent(x.density):>8}  {_percent(x.block_density):>8}  {x.sparse_calls:>7}  {x.dense_calls:>7}"
    return f"  {x.layer:>5}  {x.state:<10}  {numbers}  {x.why or ''}".rstrip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
