"""Climb: weights are changed a group of layers at a time, and kept where what the model makes gets better.

Weights are measured with one group sparse at a time and one share of tiles. Errors of groups that are sparse together
do not add up as that says, so the allocation is tried with other weights, at the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from visparse.head_search.choose import Chosen, Part, Table
from visparse.head_search.judge import OutputJudge, digest
from visparse.head_search.refine import Variant
from visparse.head_search.sensitivity import groups_of
from visparse.plan import SparsePlan

FACTOR = 3.0
GROUPS = 8  # of layers, where no weights were measured
GAIN = 0.02  # what is less may be chance, or fit these prompts only
_LEAST = 1e-12  # an error that is rounding

Move = tuple[int, int, float]  # range of steps, group of layers, factor


@dataclass(frozen=True, kw_only=True)
class Climbed:
    """What a climb found.

    Attributes:
        weights: (range, layer) -> by how much errors count.
        chosen: the allocation with them.
        plan: its plan.
        error: of the output over that of the start: root of the mean over prompts of the squared ratio.
        tried: what was judged, in order: ``range``, ``layers``, ``factor``, ``error`` over the start's, ``kept``.
    """

    weights: Mapping[Part, float]
    chosen: Chosen
    plan: SparsePlan
    error: float
    tried: tuple[dict[str, Any], ...]


def climb_from(
    way: Variant,
    table: Table,
    allocate: Callable[[Variant], Chosen],
    plan_of: Callable[[Chosen], SparsePlan],
    judge: OutputJudge,
    *,
    groups: int,
    tries: int,
    measured: Mapping[Part, float] | None = None,
) -> tuple[Variant, Climbed]:
    """Climb from a way to weigh errors; see `climb`.

    Args:
        way: to begin with.
        table: of scores.
        allocate: function (way) -> allocation at the budget.
        plan_of: function (allocation) -> its plan.
        judge, groups, tries, measured: as in `climb`.

    Returns:
        The way with the weights that were found, and what was found.
    """
    parts = sorted(table.error)

    def weighed(weights: Mapping[Part, float]) -> Variant:
        return replace(way, weights=lambda parts: weights)

    def make(weights: Mapping[Part, float]) -> tuple[Chosen, SparsePlan]:
        chosen = allocate(weighed(weights))
        return chosen, plan_of(chosen)

    start = way.weights(parts) or dict.fromkeys(parts, 1.0)
    found = climb(table, start, make, judge, groups=groups, tries=tries, measured=measured)
    return weighed(found.weights), found


def climb(
    table: Table,
    start: Mapping[Part, float],
    make: Callable[[Mapping[Part, float]], tuple[Chosen, SparsePlan]],
    judge: OutputJudge,
    *,
    groups: int,
    tries: int,
    measured: Mapping[Part, float] | None = None,
) -> Climbed:
    """Multiply the weight of one group of layers in one range of steps by `FACTOR` or its inverse, again and again.

    The group with the largest share of the predicted error comes first. A change is kept where the judged error falls
    by more than `GAIN`; each prompt counts by its error over its own at the start, so that none rules. The same
    judgements lead to the same plan.

    Args:
        table: of scores.
        start: weights to begin with.
        make: function (weights) -> allocation at the budget, and its plan.
        judge: of the output; where its time is over the climb ends.
        groups: number of groups of layers.
        tries: most plans that are judged, the first one not counted.
        measured: weights that say which groups have the largest errors; None: those of the start.
    """
    weights, belief = dict(start), dict(start if measured is None else measured)
    chosen, plan = make(weights)
    before = judge.errors(plan, "start of the climb")
    best, known = 1.0, {digest(plan)}
    tried: list[dict[str, Any]] = []
    refused: set[Move] = set()
    cut = groups_of(table.layers, groups)
    moves = _moves(table, chosen, belief, cut, refused) if before is not None else []
    while before is not None and moves and len(tried) < tries:
        move = moves.pop(0)
        number, group, factor = move
        parts = [(number, layer) for layer in cut[group]]
        changed = weights | {part: factor * weights[part] for part in parts}
        made = make(changed)
        if digest(made[1]) in known:
            continue
        known.add(digest(made[1]))
        about = {"range": number + 1, "layers": [cut[group][0], cut[group][-1]], "factor": round(factor, 4)}
        after = judge.errors(made[1], f"climb {len(tried) + 1} of {tries}")
        if after is None:
            break
        error = relative(after, before)
        kept = error < (1 - GAIN) * best
        tried.append({**about, "error": round(error, 4), "kept": kept})
        if not kept:
            refused.add(move)
            continue
        best, weights, (chosen, plan) = error, changed, made
        belief |= {part: factor * belief[part] for part in parts}
        moves = _moves(table, chosen, belief, cut, refused)
    return Climbed(weights=weights, chosen=chosen, plan=plan, error=best, tried=tuple(tried))


def relative(after: Sequence[float], before: Sequence[float]) -> float:
    """Root of the mean over prompts of the squared ratio of two errors.

    Args:
        after, before: one error for each prompt.
    """
    ratios = [a / max(b, _LEAST) for a, b in zip(after, before, strict=True)]
    return float((sum(ratio**2 for ratio in ratios) / len(ratios)) ** 0.5)


def _moves(
    table: Table, chosen: Chosen, belief: Mapping[Part, float], cut: Sequence[Sequence[int]], refused: set[Move]
) -> list[Move]:
    """All changes, those of the largest predicted errors first, and last those that were refused before."""
    errors = table.parts_of_error(chosen, belief)
    places = [(number, group) for number in range(table.ranges) for group in range(len(cut))]
    places.sort(key=lambda at: -sum(errors[at[0], layer] for layer in cut[at[1]]))
    moves = [(*place, factor) for place in places for factor in (FACTOR, 1 / FACTOR)]
    return sorted(moves, key=lambda move: move in refused)
