"""Explain: what a plan will do at each step of a run, and how long self-attention should take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from visparse.explain_costs import Costs, Range, Stretch
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.rules import ModelFingerprint
from visparse.schedule import Sigmas


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a plan will do; `str()` is a table for people, `to_dict()` is JSON.

    Times are of self-attention alone, for one pass of the denoiser with one sequence at each step.

    Attributes:
        plan: its name.
        model: fingerprint of the denoiser.
        layout: grid and extra tokens.
        device: what was asked for.
        stretches: in order of steps.
        dense_milliseconds: predicted time of a step that is all dense; None where the device was not measured.
        refresh_milliseconds: predicted time that one refresh adds where the overlap falls: least and most; None where
            the plan has no such refresh, and where the device was not measured.
        source: where times come from; why there are none where there are none.
        notes: why the run will not be as it may have been meant.
    """

    plan: str
    model: ModelFingerprint
    layout: Layout
    device: str
    stretches: tuple[Stretch, ...]
    dense_milliseconds: float | None
    source: str
    notes: tuple[str, ...]
    refresh_milliseconds: Range | None = None

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.stretches[-1].last + 1

    @property
    def milliseconds(self) -> Range | None:
        """Predicted time of self-attention in the run: least and most; None where it was not measured.

        Of the steps that may be measured again where the overlap falls, one is counted as measured.
        """
        parts = [(s.milliseconds, s.steps) for s in self.stretches if s.milliseconds is not None]
        if len(parts) < len(self.stretches):
            return None
        if self.refresh_milliseconds is not None:
            parts.append((self.refresh_milliseconds, 1))
        return sum(ms[0] * n for ms, n in parts), sum(ms[1] * n for ms, n in parts)

    @property
    def speedup(self) -> Range | None:
        """All-dense time / predicted time: least and most; None where it was not measured."""
        if self.milliseconds is None or self.dense_milliseconds is None:
            return None
        dense, (least, most) = self.dense_milliseconds * self.steps, self.milliseconds
        return (dense / most, dense / least) if least else None

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return {
            "plan": self.plan,
            "model": asdict(self.model),
            "grid": list(self.layout.grid),
            "tokens": self.layout.tokens,
            "device": self.device,
            "steps": self.steps,
            "stretches": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(stretch).items()}
                | {"what": str(stretch)}
                for stretch in self.stretches
            ],
            "dense_milliseconds": self.dense_milliseconds,
            "milliseconds": None if self.milliseconds is None else list(self.milliseconds),
            "refresh_milliseconds": None if self.refresh_milliseconds is None else list(self.refresh_milliseconds),
            "speedup": None if self.speedup is None else list(self.speedup),
            "source": self.source,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """The explanation as a table."""
        model, grid = self.model, "x".join(map(str, self.layout.grid))
        extra = f" + {self.layout.extra}" if self.layout.extra else ""
        rows = [("steps", "what happens", "blocks", "ms a step")]
        for stretch in self.stretches:
            steps = f"{stretch.first}" if stretch.steps == 1 else f"{stretch.first}-{stretch.last}"
            time = "-" if stretch.milliseconds is None else _range(stretch.milliseconds, _number)
            rows.append((steps, str(stretch), _range(stretch.block_density, "{:.1%}".format), time))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"plan {self.plan!r} on {grid}{extra} = {self.layout.tokens} tokens, {self.steps} steps, {self.device}; "
            f"{model.layers} layers of {model.heads} heads of {model.head_dim}"
        ]
        for steps, what, blocks, time in rows:
            lines.append(
                f"  {steps:>{widths[0]}}  {what:<{widths[1]}}  {blocks:>{widths[2]}}  {time:>{widths[3]}}".rstrip()
            )
        if self.milliseconds is not None and self.dense_milliseconds is not None:
            total, dense = _range(self.milliseconds, _number), _number(self.dense_milliseconds * self.steps)
            faster = "" if self.speedup is None else f": {_range(self.speedup, '{:.2f}'.format)} times faster"
            lines.append(f"  self-attention of the run: {total} ms, all dense {dense} ms{faster}")
        lines.append(f"  times: {self.source}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def explain(
    plan: SparsePlan,
    model: ModelFingerprint,
    layout: Layout,
    steps: int,
    *,
    device: str = "cpu",
    sigmas: Sigmas | None = None,
) -> Explanation:
    """Say what a plan will do at each step of a run; nothing is run and no device is needed.

    Args:
        plan: the plan.
        model: shape of the denoiser.
        layout: grid and extra tokens.
        steps: of the run, as asked for from the pipeline.
        device: ``"cpu"``, a measured GPU such as ``"h200"``, or a device of this machine such as ``"cuda"``.
        sigmas: noise level of each step; only schedules with `sigma_above` need it.

    Returns:
        The explanation. What proxies and scores cost is a bound, not a measurement; applying statistics and residual is
        not counted.

    Raises:
        ValueError: the plan is for another model, a pattern does not fit the grid, or the run cannot be served.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps: wanted an int of at least 1, got {steps!r}; 50 is usual")
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"sigmas: wanted {steps}, one for each step, got {len(sigmas)}")
    plan.check_model(model)
    notes = [plan.check_run(steps, sigmas)]
    served = plan.grids is None or layout.grid in plan.grids
    if served:
        plan.check_grid(model, layout.grid, steps, sigmas)
    else:
        notes.append(f"grid {layout.grid} is not one of the plan's grids, so all runs dense")
    costs = Costs(plan, model, layout, device)
    table = plan.timetable(steps, sigmas)
    stretches: list[Stretch] = []
    for step in range(steps):
        here = costs.step(step, table) if served else costs.dense_step(step)
        before = stretches[-1] if stretches else None
        if before is not None and before == replace(here, first=before.first, last=before.last):
            stretches[-1] = replace(before, last=step)
        else:
            stretches.append(here)
    whole = costs.whole
    again = [step for step in range(steps) if served and table.perhaps(step)]
    if again and plan.overlap is not None:
        notes.append(
            f"where the overlap falls below {plan.overlap.below:g}, the next step is measured again; the time of the "
            "run counts one such step"
        )
    return Explanation(
        plan=plan.name,
        model=model,
        layout=layout,
        device=device,
        stretches=tuple(stretches),
        dense_milliseconds=costs.dense,
        source=whole.source or f"not measured: {whole.not_measured}",
        notes=tuple(note for note in notes if note is not None),
        refresh_milliseconds=costs.once_more(again[0], table) if again else None,
    )


def _range(values: Range, form: Callable[[float], str]) -> str:
    least, most = form(values[0]), form(values[1])
    return least if least == most else f"{least} to {most}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
