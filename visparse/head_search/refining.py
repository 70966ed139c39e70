"""Refining: weights of layers, allocations and schedules, tried on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from visparse.head_search.choose import Chosen, Table
from visparse.head_search.climb import GROUPS, climb_from
from visparse.head_search.judge import OutputJudge
from visparse.head_search.ready import Ready
from visparse.head_search.record import Recorder
from visparse.head_search.refine import Variant, Weights, judge_all, schedules_to_try, variants_of, with_refresh
from visparse.head_search.schedule import make_schedule
from visparse.head_search.sensitivity import find_weights
from visparse.plan import SparsePlan

if TYPE_CHECKING:
    from visparse.head_search.searcher import Searcher

_JUDGED = 4  # prompts, at most
_WAYS = 4  # allocations before the climb


def refined(searcher: Searcher, table: Table, ready: Ready, recorder: Recorder) -> SparsePlan:
    """The best of several allocations and schedules, by the model's output.

    Args:
        searcher: of the model.
        table: of scores.
        ready: what was known before scoring.
        recorder: makes the plans.

    Raises:
        ValueError: no plan can be had within the budget.
    """
    settings = searcher.settings
    judge = OutputJudge(
        searcher.target,
        partial(searcher.generate, decode=True),
        min(_JUDGED, searcher.runs),
        searcher.work,
        deadline=searcher.deadline,
        before_run=searcher.progress.start,
    )
    first = recorder.plan(searcher.choose(table, ready))
    weights = None
    if settings.weigh:
        family = "foveal" if "foveal" in ready.targets else list(ready.targets)[-1]
        attention = ready.targets[family] or 0.25
        weights = find_weights(table, family, attention, settings.weigh, first, settings.refresh, judge)
    made, refused = _allocations(searcher, table, ready, recorder, weights)
    if not made:
        raise refused[0]
    found = judge_all(made, judge)
    entries: dict[str, Any] = {
        "output_errors": {name: round(error, 6) for name, error in found.errors.items()},
        "taken": found.taken,
    }
    if weights is not None:
        entries["weights"] = [
            [float(f"{weights[number, layer]:.4g}") for layer in table.layers] for number in range(table.ranges)
        ]
    plan = found.plan
    variant = next(v for v in variants_of(list(ready.targets), weights) if v.name == found.taken)
    if settings.refine > _WAYS and found.errors:
        variant, plan, entries["climb"] = _climbed(searcher, table, ready, recorder, variant, judge, weights)
    if settings.try_dense_steps or settings.try_refresh:
        plan, entries["schedules"] = _schedules(searcher, table, ready, recorder, variant, judge, plan)
    return recorder.with_entries(plan, entries)


def _allocations(
    searcher: Searcher, table: Table, ready: Ready, recorder: Recorder, weights: Weights | None
) -> tuple[dict[str, tuple[Chosen, SparsePlan]], list[ValueError]]:
    settings, refused = searcher.settings, []
    made: dict[str, tuple[Chosen, SparsePlan]] = {}
    for variant in variants_of(list(ready.targets), weights)[: min(settings.refine, _WAYS)]:
        try:
            chosen = _allocate(searcher, table, variant, ready.targets[variant.family])
        except ValueError as error:
            refused.append(error)
            continue
        plan = recorder.plan(chosen)
        if all(plan.assignment != other.assignment or plan.default != other.default for _, other in made.values()):
            made[variant.name] = chosen, plan
    return made, refused


def _allocate(searcher: Searcher, table: Table, variant: Variant, attention: float | None) -> Chosen:
    return table.by_budget(
        variant.family,
        searcher.model.layers,
        attention=attention,
        density=searcher.settings.density,
        weights=variant.weights(sorted(table.error)),
        only=variant.only,
    )


def _climbed(
    searcher: Searcher,
    table: Table,
    ready: Ready,
    recorder: Recorder,
    variant: Variant,
    judge: OutputJudge,
    measured: Weights | None,
) -> tuple[Variant, SparsePlan, dict[str, Any]]:
    """Other weights than those of the best way, as many as are left of `refine`; way, plan, and what was tried."""
    settings = searcher.settings
    better, found = climb_from(
        variant,
        table,
        lambda own: _allocate(searcher, table, own, ready.targets[own.family]),
        recorder.plan,
        judge,
        groups=settings.weigh or GROUPS,
        tries=settings.refine - _WAYS,
        measured=measured,
    )
    entry: dict[str, Any] = {"error": round(found.error, 4), "tried": list(found.tried)}
    absolute = judge.error(found.plan, "climbed")
    entry["output_error"] = None if absolute is None else round(absolute, 6)
    return better, found.plan, entry


def _schedules(
    searcher: Searcher,
    table: Table,
    ready: Ready,
    recorder: Recorder,
    variant: Variant,
    judge: OutputJudge,
    plan: SparsePlan,
) -> tuple[SparsePlan, list[dict[str, Any]]]:
    """Other dense steps and refreshes at the same speed-up of the run; the best plan, and what each gave."""
    settings, share, family = searcher.settings, ready.share or 0.5, variant.family
    dense = dict.fromkeys([settings.dense_steps, *settings.try_dense_steps])
    again = dict.fromkeys([settings.refresh, *settings.try_refresh] if family == "foveal" else [settings.refresh])
    tried, refused = schedules_to_try(
        lambda steps, refresh: make_schedule(family, searcher.total, steps, refresh), list(dense), list(again)
    )
    plans: dict[tuple[Any, Any], tuple[Chosen, SparsePlan]] = {}
    rows: dict[tuple[Any, Any], dict[str, Any]] = {
        (steps, refresh): {"dense_steps": steps, "refresh": refresh, "why_not": why}
        for (steps, refresh), why in refused.items()
    }
    for (steps, refresh), schedule in tried.items():
        row: dict[str, Any] = {"dense_steps": steps, "refresh": refresh}
        rows[steps, refresh] = row
        attention = schedule.attention_for(settings.speedup or 1.0, share)
        row["attention"] = round(attention, 4)
        if attention <= 0:
            row["why_not"] = "beyond the ceiling"
            continue
        own = Table(table.scores, table.candidates, table.costs, {family: schedule})
        parts = sorted(own.error)
        known = variant.weights(sorted(table.error))
        weights = None if known is None else {part: _mean(known, part[1]) for part in parts}
        try:
            chosen = own.by_budget(
                family, searcher.model.layers, attention=min(attention, 1.0), weights=weights, only=variant.only
            )
        except ValueError as error:
            row["why_not"] = str(error)
            continue
        chosen = with_refresh(chosen, refresh)
        plans[steps, refresh] = (
            chosen,
            recorder.plan(chosen, schedule=schedule, dense_steps=steps, refresh=refresh),
        )
    names = {key: f"dense steps {key[0]}, refresh {key[1]}" for key in plans}
    found = judge_all({names[key]: made for key, made in plans.items()}, judge) if plans else None
    if found is None:
        return plan, list(rows.values())
    for key, name in names.items():
        rows[key]["output_error"] = None if name not in found.errors else round(found.errors[name], 6)
    present = judge.error(plan, "taken")
    best = min(found.errors.values(), default=float("inf"))
    better = present is not None and best < present
    return (found.plan if better else plan), list(rows.values())


def _mean(weights: Mapping[tuple[int, int], float], layer: int) -> float:
    own = [weight for (_, at), weight in weights.items() if at == layer]
    return sum(own) / len(own)
