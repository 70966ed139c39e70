"""What a plan does at each step of a run: the half of `SparsePlan` that is about time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from visparse.compensation import Proxies, ReuseResidual, ReuseStatistics
from visparse.compensation.refresh import Overlap, Refresh
from visparse.patterns.registry import SELECTORS
from visparse.patterns.selector import Selector
from visparse.ranges import edges
from visparse.rules import Rule
from visparse.schedule import DenseSteps, Sigmas, Timetable
from visparse.templates import PatternTemplate


class PlanSteps:
    """Schedule and measurements of a plan.

    Throughout, `total` is the number of steps of the run and `sigmas` the noise level of each; None while they are not
    known. What needs one of them and does not get it raises ValueError, and the text says what to use instead.
    """

    patterns: Mapping[str, PatternTemplate]
    default: str
    assignment: tuple[Rule, ...]
    dense_steps: int | float | DenseSteps
    proxies: Proxies | None
    statistics: ReuseStatistics | None
    residual: ReuseResidual | None

    @cached_property
    def selectors(self) -> dict[str, Selector]:
        """Selectors among the patterns that the default and the rules name; keys as `SparsePlan.names` gives them."""
        found: dict[str, Selector] = {}
        for name in dict.fromkeys([self.default, *(rule.pattern for rule in self.assignment)]):
            template = self.patterns[name]
            parts: dict[str, Mapping[str, Any]] = {name: template.entry}
            if template.per_head:
                parts = {f"{name}[{place}]": part for place, part in enumerate(template.entry["patterns"])}
            found |= {key: SELECTORS[part["name"]].from_dict(part) for key, part in parts.items() if _selects(part)}
        return found

    @cached_property
    def refreshes(self) -> dict[str, Refresh]:
        """What is measured at dense steps and reused -> when again: "statistics", "residual", names of selectors."""
        found = {name: one.refresh for name, one in self.selectors.items() if one.reused}
        if self.statistics is not None:
            found["statistics"] = self.statistics.refresh
        if self.residual is not None:
            found["residual"] = self.residual.refresh
        return found

    @property
    def overlap(self) -> Overlap | None:
        """By which overlap something is measured again; None where nothing goes by it."""
        return next((rule for rule in self.refreshes.values() if isinstance(rule, Overlap)), None)

    @property
    def measures(self) -> bool:
        """Whether anything is measured at dense steps and reused."""
        return bool(self.refreshes)

    @property
    def is_compensated(self) -> bool:
        """Whether the plan needs more than block lists: a compensation or a selector."""
        return bool(self.proxies or self.statistics or self.residual or self.selectors)

    @property
    def needs_steps(self) -> bool:
        """Whether the plan depends on the step at all."""
        return self.measures or self._dense.any or any(rule.steps != "all" for rule in self.assignment)

    def timetable(self, total: int | None, sigmas: Sigmas | None = None) -> Timetable:
        """What happens at each step of a run."""
        return _timetable(self._dense, tuple(self.refreshes.items()), total, sigmas)

    def first_sparse_step(self, total: int | None, sigmas: Sigmas | None = None) -> int:
        """Number of dense steps at the start of a run; `total` where no step is sparse."""
        return self.timetable(total, sigmas).first_sparse

    def stage(self, step: int, total: int | None, sigmas: Sigmas | None = None) -> int:
        """The stretch of equal steps that a step lies in: -1 where it is dense by schedule, else its first step.

        A step at which something is measured is not -1 for that reason; see `is_measure_step`.
        """
        if self.timetable(total, sigmas).scheduled(step):
            return -1
        return max(mark for mark in self._marks(total, sigmas) if mark <= step)

    def last_stage(self, total: int | None, sigmas: Sigmas | None = None) -> int:
        """The stage from which on nothing in the plan changes any more; noise levels are not needed."""
        if self._dense.sigma_above is not None and sigmas is None:
            return max({0}.union(*(edges(rule.steps) for rule in self.assignment)))
        return max(self._marks(total, sigmas))

    def measured_at(self, what: str, step: int, total: int | None, sigmas: Sigmas | None = None) -> int | None:
        """The latest step, up to this one, at which something is measured; None before the first.

        Args:
            what: "statistics", "residual", or the name of a selector, as `SparsePlan.names` gives it.
            step: of the run.
            total: steps of the run; None while unknown.
            sigmas: noise level of each step; None while unknown.
        """
        return self.timetable(total, sigmas).measured_at(what, step)

    def is_measure_step(self, step: int, total: int | None, sigmas: Sigmas | None = None) -> bool:
        """Whether anything is measured at a step; the outputs of such a step are dense."""
        return self.timetable(total, sigmas).is_measured(step)

    def measure_steps(self, total: int, sigmas: Sigmas | None = None) -> dict[str, tuple[int, ...]]:
        """The steps of a run at which each thing is measured; keys as in `refreshes`."""
        table = self.timetable(total, sigmas)
        return {what: tuple(s for s in range(total) if table.measured_at(what, s) == s) for what in self.refreshes}

    def check_run(self, total: int | None, sigmas: Sigmas | None = None) -> str | None:
        """Refuse a run that cannot be served as planned; to be called before its first step.

        Returns:
            Why no step of the run will be sparse; None where some will be.

        Raises:
            ValueError: what is reused would not have been measured before the first sparse step, or the schedule needs
                the number of steps or their noise levels and they are not known.
        """
        table = self.timetable(total, sigmas)
        if self.measures and table.first_sparse == 0:
            run = "" if total is None else f" in a run of {total} steps"
            raise ValueError(f"{self._unmeasured()}{run} (dense_steps: {self._dense}); use dense_steps=1 or more")
        if total is not None and table.first_sparse >= total:
            return f"all {total} steps are dense by the plan's schedule ({self._dense}); use fewer dense steps"
        return None

    def _check_schedule(self) -> None:
        """Refuse what no run could serve; `SparsePlan` calls it once its fields are in place."""
        for name in sorted({"statistics", "residual"} & set(self.selectors)):
            raise ValueError(f"plan: the selector {name!r} has the name of a compensation; give it another name")
        for name, template in self.patterns.items():
            if _hides_selector(template.entry, template.per_head):
                raise ValueError(
                    f"plan: pattern {name!r}: a selector cannot be a part of a union or an intersection; "
                    "name it in a rule, or in a list with one pattern per head"
                )
        if self.measures and not self._dense.may_begin:
            raise ValueError(f"{self._unmeasured()} (dense_steps: {self._dense}); use dense_steps=1 or more")
        rules = {what: rule for what, rule in self.refreshes.items() if isinstance(rule, Overlap)}
        if rules and not set(rules) & set(self.selectors):
            raise ValueError(
                f"plan: {', '.join(rules)}: refresh by overlap follows a selector, and wanted one with refresh="
                f"{self.overlap}, got none; give it to a TopK or TopP too, or say the steps"
            )
        if len(set(rules.values())) > 1:
            raise ValueError(
                "plan: refresh by overlap: wanted one rule for all, got "
                f"{', '.join(f'{what}: {rule}' for what, rule in rules.items())}; make them equal"
            )

    def _unmeasured(self) -> str:
        measured = ", ".join(self.refreshes)
        return f"plan: {measured}: wanted a dense step before the first sparse one to measure at, got none"

    @property
    def _dense(self) -> DenseSteps:
        return DenseSteps.from_value(self.dense_steps)

    def _marks(self, total: int | None, sigmas: Sigmas | None = None) -> set[int]:
        return {self.first_sparse_step(total, sigmas)}.union(*(edges(rule.steps) for rule in self.assignment))


@functools.lru_cache(maxsize=64)
def _timetable(
    dense: DenseSteps, refreshes: tuple[tuple[str, Refresh], ...], total: int | None, sigmas: Sigmas | None
) -> Timetable:
    return Timetable(dense, dict(refreshes), total, sigmas)


def _selects(entry: Mapping[str, Any]) -> bool:
    return entry["name"] in SELECTORS


def _hides_selector(entry: Mapping[str, Any], allowed: bool) -> bool:
    parts = entry.get("patterns", ())
    return any((_selects(part) and not allowed) or _hides_selector(part, False) for part in parts)
