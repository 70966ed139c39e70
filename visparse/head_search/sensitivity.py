"""Sensitivity: by how much an error in a layer's attention, in a range of steps, changes the model's output.

The errors of layers are each relative to the layer's own output, and layers matter differently: on the model that ships
the first two in the last steps a hundred times as much as the middle ones. So groups of layers are made sparse alone,
one after another, and the error of the model's output over the error of their own outputs is the weight of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from visparse.head_search.build import build_plan
from visparse.head_search.candidates import Candidate
from visparse.head_search.choose import Part, Table
from visparse.head_search.judge import OutputJudge
from visparse.patterns import Dense, Selector
from visparse.plan import SparsePlan

_EXACT = 1e-10  # a squared relative error that is rounding


def groups_of(layers: Sequence[int], count: int) -> list[list[int]]:
    """Cut layers into so many groups of neighbours, as equal as can be.

    Args:
        layers: ascending.
        count: of groups; more than there are layers: each is a group.
    """
    count = min(count, len(layers))
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    return [list(layers[a:b]) for a, b in pairwise(edges)]


def reference_place(table: Table, family: str, attention: float) -> int:
    """The candidate whose cost comes nearest to a share of dense attention's; a selector where there is one.

    One that makes no error, as a selector of one tile in a grid of one tile, would say nothing.

    Args:
        table: of scores.
        family: of the candidate.
        attention: share of dense attention's time.
    """
    kept, costs = table.candidates.kept, table.costs
    wrong = [place for place in table.candidates.of(family) if not isinstance(kept[place].pattern, Dense)]
    usable = [place for place in wrong if sum(table.local_error(part, place) for part in table.error) > _EXACT] or wrong
    usable = [place for place in usable if isinstance(kept[place].pattern, Selector)] or usable
    return min(usable, key=lambda place: abs(costs.milliseconds[place] - attention * costs.dense))


def group_plan(
    table: Table, family: str, place: int, group: Sequence[int], number: int, base: SparsePlan, refresh: Any
) -> SparsePlan:
    """A plan in which one group of layers is sparse in one range of steps, and all else is dense.

    Args:
        table: of scores.
        family: of the plan.
        place: of the candidate that the group has.
        group: the layers.
        number: of the range.
        base: a plan of the search, of any family: model, grid and dense steps are taken from it.
        refresh: when the foveal family measures again.
    """
    one = table.candidates.kept[place]
    dense = Candidate("dense", family, Dense())
    starts = table.schedules[family].starts
    assert base.model is not None
    assert base.made_for is not None
    picks = {
        (at, layer, head): one if at == number else dense
        for at in range(len(starts))
        for layer in group
        for head in range(base.model.heads)
    }
    return build_plan(
        "sensitivity",
        picks,
        family=family,
        model=base.model,
        grid=base.made_for,
        dense_steps=base.dense_steps,  # type: ignore[arg-type]
        refresh=refresh,
        notes="",
        measured={},
        starts=starts,
        proxies=table.candidates.proxies,
    )


def find_weights(
    table: Table, family: str, attention: float, groups: int, base: SparsePlan, refresh: Any, judge: OutputJudge
) -> dict[Part, float] | None:
    """Measure the weight of every layer in every range of steps.

    Args:
        table: of scores.
        family: of the plans.
        attention: share of dense attention's time that the search wants; the candidate is chosen by it.
        groups: number of groups of layers.
        base: a plan of the search, of any family.
        refresh: when the foveal family measures again.
        judge: of the output.

    Returns:
        (range, layer) -> weight: squared error of the output over the squared errors of the group's layers, mean over
        prompts that count alike. None where the time was over.
    """
    place = reference_place(table, family, attention)
    shares = table.schedules[family].weights
    found: dict[tuple[Part, ...], tuple[float, ...]] = {}
    for number in range(table.ranges):
        for group in groups_of(table.layers, groups):
            plan = group_plan(table, family, place, group, number, base, refresh)
            errors = judge.errors(plan, f"layers {group[0]} to {group[-1]}, range {number + 1}")
            if errors is None:
                return None
            found[tuple((number, layer) for layer in group)] = errors
    weights: dict[Part, float] = {}
    for parts, squared in zip(found, _evenly(list(found.values())), strict=True):
        own = shares[parts[0][0]] * sum(table.local_error(part, place) for part in parts)
        weights |= dict.fromkeys(parts, squared / max(own, _EXACT))
    return weights


def _evenly(errors: Sequence[Sequence[float]]) -> list[float]:
    """Mean squared errors over prompts that count alike, however large the errors of each are in all groups together.

    Args:
        errors: for each group, one for each prompt.
    """
    totals = [sum(error**2 for error in own) for own in zip(*errors, strict=True)]
    mean = sum(totals) / len(totals)
    return [
        sum(mean * error**2 / total for error, total in zip(group, totals, strict=True) if total) / len(totals)
        for group in errors
    ]
