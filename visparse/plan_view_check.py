"""Checks of a plan against a model, grids and a run, without weights and without a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from visparse.compensation.tiles import tiles_of_plan
from visparse.explain import explain
from visparse.explain_costs import Range
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.plan_view import DEFAULT_HEAD_DIM, head_tables
from visparse.plan_view_text import grid_text, model_text
from visparse.rules import ModelFingerprint
from visparse.schedule import MissingSigmasError

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: such as "model" or "grid 5x16x16".
        ok: whether it fits.
        text: what was found, or why it does not fit.
        densities: table name -> visited blocks / all blocks on that grid: least and most; empty for other checks.
    """

    what: str
    ok: bool
    text: str
    densities: dict[str, Range]

    def __str__(self) -> str:
        """One line."""
        return f"{'ok' if self.ok else 'wrong':<5}  {self.what}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON values."""
        densities = {name: list(value) for name, value in self.densities.items()}
        return {"what": self.what, "ok": self.ok, "text": self.text, "block_density": densities}


def check_plan(
    plan: SparsePlan, models: Sequence[ModelFingerprint], grids: Sequence[Grid], steps: int
) -> tuple[Check, ...]:
    """Check a plan that could be read.

    Args:
        plan: the plan.
        models: shapes that it must fit; none: only patterns are looked at.
        grids: (frames, height, width) in tokens that it must fit.
        steps: of the run.

    Returns:
        All checks, those that failed among them.
    """
    checks = [_try("model", partial(_model, plan, model)) for model in models]
    fitting = [model for model, check in zip(models, checks, strict=True) if check.ok]
    checks.append(_try(f"run of {steps} steps", partial(_run, plan, steps)))
    checks += [_try(f"grid {grid_text(grid)}", partial(_grid, plan, fitting, grid)) for grid in grids]
    return tuple(checks)


def block_densities(
    plan: SparsePlan, names: Sequence[str], grid: Grid, head_dim: int = DEFAULT_HEAD_DIM
) -> dict[str, Range]:
    """Visited blocks / all blocks of patterns on a grid, as the CPU's blocks are.

    Args:
        plan: the plan; with proxies, patterns are widened to tiles, as they are when it runs. Heads beside a selector
            in a layer without proxies are widened too, which depends on the layer and is not counted.
        names: names of its table, parts of lists with one per head among them.
        grid: (frames, height, width), in tokens.
        head_dim: size of a head; it decides about the size of blocks.

    Returns:
        Least and most, which differ only for selectors that decide by what they see; in the order of names.

    Raises:
        ValueError: a pattern does not fit the grid.
    """
    found = {}
    for name in names:
        alone = replace(
            plan,
            patterns={"alone": plan.patterns[name]},
            default="alone",
            assignment=(),
            dense_steps=1,
            dense_layers=0,
            statistics=None,
            residual=None,
            model=None,
            grids=None,
        )
        model = ModelFingerprint(model_class="any", layers=1, heads=1, head_dim=head_dim)
        try:
            if plan.proxies is not None and name not in plan.selectors:
                tiles = tiles_of_plan(plan, Layout(grid), head_dim, torch.device("cpu"))
                found[name] = tiles.block_density(plan.patterns[name].resolve(grid))
                continue
            found[name] = explain(alone, model, Layout(grid), 2).stretches[-1].block_density
        except ValueError as error:
            raise ValueError(f"pattern {name!r}: {error}") from error
    return found


def names_used(plan: SparsePlan, model: ModelFingerprint | None = None) -> list[str]:
    """Table names that some head has at some step, dense ones aside; parts stand for lists with one per head.

    Args:
        plan: the plan.
        model: shape of the model; None: all that the default and the rules name.
    """
    if model is not None:
        cells = [name for table in head_tables(plan, model) for row in table.cells for name in row]
        return list(dict.fromkeys(name for name in cells if name is not None))
    names = dict.fromkeys([plan.default, *(rule.pattern for rule in plan.assignment)])
    parts = [_parts(plan, name) for name in names]
    return [name for part in parts for name in part if not plan.patterns[name].is_dense]


def _parts(plan: SparsePlan, name: str) -> list[str]:
    template = plan.patterns[name]
    return [f"{name}[{i}]" for i in range(len(template.entry["patterns"]))] if template.per_head else [name]


def _try(what: str, look: Callable[[], tuple[str, dict[str, Range]]]) -> Check:
    try:
        text, densities = look()
    except ValueError as error:
        return Check(what=what, ok=False, text=str(error).removeprefix("plan: "), densities={})
    return Check(what=what, ok=True, text=text, densities=densities)


def _model(plan: SparsePlan, model: ModelFingerprint) -> tuple[str, dict[str, Range]]:
    plan.check_model(model)
    return model_text(model) + ("; the plan is for any model" if plan.model is None else ""), {}


def _run(plan: SparsePlan, steps: int) -> tuple[str, dict[str, Range]]:
    try:
        reason = plan.check_run(steps)
    except MissingSigmasError:
        return "not checked: the schedule goes by noise level, which only a scheduler knows", {}
    if reason is not None:
        raise ValueError(reason)
    table = plan.timetable(steps)
    sparse = [step for step in range(steps) if not table.scheduled(step) and not table.is_measured(step)]
    text = f"{len(sparse)} sparse steps, the first is {table.first_sparse}"
    again = [step for step in sparse if table.perhaps(step)]
    if again and plan.overlap is not None:
        text += f"; {len(again)} of them, from {again[0]} on, may be measured again, where the overlap has fallen"
        text += f" below {plan.overlap.below:g}"
    return text, {}


def _grid(plan: SparsePlan, models: Sequence[ModelFingerprint], grid: Grid) -> tuple[str, dict[str, Range]]:
    if plan.grids is not None and grid not in plan.grids:
        known = ", ".join(map(grid_text, plan.grids))
        raise ValueError(f"not one of the plan's grids ({known}), so all would run dense; add it to the plan's grids")
    names = list(dict.fromkeys(name for model in models or (None,) for name in names_used(plan, model)))
    found = block_densities(plan, names, grid, models[0].head_dim if models else DEFAULT_HEAD_DIM)
    parts = [f"{name} {_percent(share)}" for name, share in found.items()]
    if models:
        cells = [name for row in head_tables(plan, models[0])[-1].cells for name in row]
        shares = [found[name] if name is not None else (1.0, 1.0) for name in cells]
        mean = sum(low for low, _ in shares) / len(shares), sum(high for _, high in shares) / len(shares)
        parts.append(f"mean over all heads at the last steps {_percent(mean)}")
    return "block density " + "; ".join(parts) if parts else "all heads are dense", found


def _percent(share: Range) -> str:
    least, most = (f"{value:.1%}" for value in share)
    return least if least == most else f"{least} to {most}"
