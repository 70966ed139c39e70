"""Refine: several allocations and schedules, judged by the model's output with the whole plan at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from visparse.head_search.candidates import Candidate
from visparse.head_search.choose import Chosen, Part
from visparse.head_search.judge import OutputJudge
from visparse.head_search.schedule import Schedule
from visparse.patterns import Dense, Selector
from visparse.plan import SparsePlan

Weights = Mapping[Part, float]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to allocate.

    Attributes:
        name: in the plan's record.
        family: of candidates.
        only: which of them; None: all.
        weights: function (parts) -> by how much the errors of each count.
    """

    name: str
    family: str
    only: Callable[[Candidate], bool] | None = None
    weights: Callable[[Sequence[Part]], Weights | None] = field(default=lambda parts: None)


def variants_of(families: Sequence[str], measured: Weights | None = None) -> list[Variant]:
    """The ways to allocate, the most promising first.

    Args:
        families: that were scored.
        measured: weights of `sensitivity.find_weights`; None: not measured, and guesses are tried.
    """
    first = "foveal" if "foveal" in families else families[-1]
    found = [Variant(name=family, family=family) for family in dict.fromkeys([first, *families])]
    if measured is not None:
        half = {part: weight**0.5 for part, weight in measured.items()}
        by_name: dict[str, Weights] = {"by weight": measured, "by root of weight": half}
        weighed = [
            Variant(name=f"{family}, {name}", family=family, weights=lambda parts, own=own: own)  # type: ignore[misc]
            for family in dict.fromkeys([first, *families])
            for name, own in by_name.items()
        ]
        found = [*weighed[:2], *found, *weighed[2:]]
    if first != "plain":
        found.append(Variant(name=f"{first}, by content", family=first, only=_by_content))
    if measured is None:
        for family in dict.fromkeys([first, *families]):
            found.append(Variant(name=f"{family}, first layers", family=family, weights=_first))
            found.append(Variant(name=f"{family}, last layers", family=family, weights=_last))
    return found


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a refinement found.

    Attributes:
        plan: the best one.
        chosen: its allocation.
        errors: name of the variant -> error of the output.
        taken: name of the best one.
    """

    plan: SparsePlan
    chosen: Chosen
    errors: Mapping[str, float]
    taken: str


def judge_all(made: Mapping[str, tuple[Chosen, SparsePlan]], judge: OutputJudge) -> Judged:
    """Judge plans, and take the best.

    Args:
        made: name -> allocation and plan, the most promising first.
        judge: of the output. Where its time is over, the plans that were not judged do not count; where none was,
            the first one is taken.
    """
    errors: dict[str, float] = {}
    for name, (_, plan) in made.items():
        error = judge.error(plan, name)
        if error is None:
            break
        errors[name] = error
    best = min(errors, key=lambda name: errors[name]) if errors else next(iter(made))
    return Judged(plan=made[best][1], chosen=made[best][0], errors=errors, taken=best)


def with_refresh(chosen: Chosen, refresh: Any) -> Chosen:
    """The same allocation with choices by content that are made again at other steps.

    Args:
        chosen: an allocation.
        refresh: see `visparse.compensation.refresh`.
    """
    known: dict[Candidate, Candidate] = {}
    for one in set(chosen.picks.values()):
        pattern = one.pattern
        if isinstance(pattern, Selector) and pattern.reused:
            pattern = replace(pattern, refresh=refresh)
        known[one] = replace(one, pattern=pattern)
    return replace(chosen, picks={name: known[one] for name, one in chosen.picks.items()})


def schedules_to_try(
    make: Callable[[int | float, Any], Schedule], dense_steps: Sequence[int | float], refreshes: Sequence[Any]
) -> tuple[dict[tuple[int | float, Any], Schedule], dict[tuple[int | float, Any], str]]:
    """The schedules that can be made and differ, and why others cannot be.

    Args:
        make: function (dense steps, refresh) -> schedule; ValueError where there is none.
        dense_steps: to be tried.
        refreshes: to be tried.
    """
    found: dict[tuple[int | float, Any], Schedule] = {}
    refused: dict[tuple[int | float, Any], str] = {}
    for steps in dense_steps:
        for refresh in refreshes:
            try:
                schedule = make(steps, refresh)
            except ValueError as error:
                refused[steps, refresh] = str(error)
                continue
            if schedule not in found.values():
                found[steps, refresh] = schedule
    return found, refused


def _by_content(candidate: Candidate) -> bool:
    return isinstance(candidate.pattern, (Selector, Dense))


def _first(parts: Sequence[Part]) -> Weights:
    last = max(layer for _, layer in parts)
    return {part: 2.0 - 1.5 * part[1] / max(last, 1) for part in parts}


def _last(parts: Sequence[Part]) -> Weights:
    last = max(layer for _, layer in parts)
    return {part: 0.5 + 1.5 * part[1] / max(last, 1) for part in parts}
