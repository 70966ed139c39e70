"""Schedules: which steps of a run are dense, and at which something that is reused is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from visparse.compensation.refresh import Overlap, Refresh, refresh_steps
from visparse.errors import check_keys, nearest

Sigmas = tuple[float, ...]


class MissingSigmasError(ValueError):
    """A schedule by noise level in a run whose noise levels are not known."""


@dataclass(frozen=True, kw_only=True)
class DenseSteps:
    """Which steps are dense. A step is dense where any of these says so.

    Shares are of the run's steps, rounded to the nearest whole step (half up).

    Args:
        first: that many steps, or that share of them, at the start.
        last: that many steps, or that share of them, at the end; needs the number of steps.
        every: n: after the first sparse step s, steps s + n - 1, s + 2n - 1, ... are dense; 0: none. 1 would leave no
            sparse step.
        sigma_above: steps whose noise level is at least this; for flow matching it lies in [0, 1]. Needs a scheduler
            that has sigmas.

    Raises:
        ValueError: a value that is not one of those above.
    """

    first: int | float = 0
    last: int | float = 0
    every: int = 0
    sigma_above: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("first", "last"):
            value = getattr(self, name)
            if not _is_amount(value):
                raise ValueError(
                    f"{name}: wanted a number of steps (int >= 0) or a share of them (float in [0, 1)), got {value!r}"
                )
        if type(self.every) is not int or self.every < 0 or self.every == 1:
            raise ValueError(
                f"every: wanted an int >= 2 (each n-th step is dense) or 0 (none), got {self.every!r}; "
                "use the plan 'dense' for dense steps only"
            )
        sigma = self.sigma_above
        number = isinstance(sigma, (int, float)) and not isinstance(sigma, bool)
        if sigma is not None and not (number and 0 < sigma < math.inf):
            raise ValueError(f"sigma_above: wanted a noise level above 0 or None, got {sigma!r}; leave it out for none")

    @classmethod
    def from_value(cls, value: object) -> DenseSteps:
        """Read a plan's ``dense_steps``: a number (the first steps), the JSON form, or the object itself.

        Raises:
            ValueError: anything else.
        """
        if isinstance(value, cls):
            return value
        if _is_amount(value):
            return cls(first=value)  # type: ignore[arg-type]
        if not isinstance(value, Mapping):
            raise ValueError(
                "plan: dense_steps must be a number of steps (int >= 0), a share of them (float in [0, 1)), or an "
                f"object such as {{'first': 2, 'last': 1}}, got {value!r}"
            )
        check_keys(value, [field.name for field in fields(cls)], "plan: dense_steps")
        try:
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"plan: dense_steps: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_value` gives back an equal one."""
        return vars(self).copy()

    @property
    def may_begin(self) -> bool:
        """Whether a run can begin with a dense step."""
        return self.first != 0 or self.sigma_above is not None

    @property
    def any(self) -> bool:
        """Whether any step can be dense."""
        return self.may_begin or self.last != 0 or self.every != 0

    def __str__(self) -> str:
        """In words."""
        parts = [f"{name} {_amount(getattr(self, name))}" for name in ("first", "last") if getattr(self, name)]
        parts += [f"1 of {self.every} from the first sparse one"] if self.every else []
        parts += [f"sigma of at least {self.sigma_above:g}"] if self.sigma_above is not None else []
        return ", ".join(parts) or "none"


class Timetable:
    """What happens at each step of one run.

    A step is dense by the schedule, or because something is measured there; else it is sparse. What is reused is
    measured first at the last dense step before the first sparse one, and then at its own refreshes, as far as a sparse
    step comes after them.
    """

    def __init__(
        self, dense: DenseSteps, refreshes: Mapping[str, Refresh], total: int | None, sigmas: Sigmas | None = None
    ) -> None:
        """Fix the steps of a run.

        Args:
            dense: which steps are dense.
            refreshes: what is measured -> when it is measured again.
            total: steps of the run; None while unknown.
            sigmas: noise level of each step; None where it is not known.

        Raises:
            MissingSigmasError: the schedule goes by noise level and there are none.
            ValueError: the schedule needs the number of steps, and it is not known.
        """
        self.dense, self.refreshes, self.total, self.sigmas = dense, dict(refreshes), total, sigmas
        self._answers: dict[Overlap, frozenset[int]] = {}
        if dense.sigma_above is not None and not sigmas:
            raise MissingSigmasError(
                f"dense_steps: sigma_above={dense.sigma_above:g} needs the noise level of each step, and it is not "
                "known here; use 'first', a number of steps"
            )
        self._first, self._last = self._count("first"), self._count("last")
        if total is None:
            self.first_sparse, self._last_sparse = self._first, None
            return
        self.first_sparse = next((step for step in range(total) if not self._fixed(step)), total)
        sparse = [step for step in range(self.first_sparse, total) if not self.scheduled(step)]
        self._last_sparse = sparse[-1] if sparse else -1

    def scheduled(self, step: int) -> bool:
        """Whether the schedule itself wants a step dense."""
        since = step - self.first_sparse + 1
        return since <= 0 or self._fixed(step) or bool(self.dense.every and since % self.dense.every == 0)

    def is_dense(self, step: int) -> bool:
        """Whether the model's own output is used at a step: by the schedule, or to measure."""
        return self.scheduled(step) or self.is_measured(step)

    def measured_at(self, what: str, step: int) -> int | None:
        """The latest step, up to this one, at which something is measured; None before the first.

        Args:
            what: a key of ``refreshes``.
            step: of the run.

        Raises:
            ValueError: nothing of that name is measured, or a share is asked for and the number of steps is unknown.
        """
        if what not in self.refreshes:
            raise ValueError(
                f"what: {what!r} is not measured{nearest(what, self.refreshes)} "
                f"(measured: {', '.join(self.refreshes) or 'nothing'})"
            )
        first, refresh = self.first_sparse - 1, self.refreshes[what]
        if not self.is_used(first) or step < first:
            return None
        again = range(first, step + 1, refresh) if type(refresh) is int else refresh_steps(refresh, first, self.total)
        return max(mark for mark in (first, *(again or ())) if mark <= step and self.is_used(mark))

    def measured(self, step: int) -> tuple[str, ...]:
        """What is measured at a step."""
        return tuple(what for what in self.refreshes if self.measured_at(what, step) == step)

    def is_measured(self, step: int) -> bool:
        """Whether anything is measured at a step."""
        return any(self.measured_at(what, step) == step for what in self.refreshes)

    def perhaps(self, step: int) -> tuple[str, ...]:
        """What may be measured again at a step, where the overlap falls; needs the number of steps."""
        rules = {what: rule for what, rule in self.refreshes.items() if isinstance(rule, Overlap)}
        for rule in set(rules.values()) - set(self._answers):
            self._answers[rule] = self._may(rule)
        return tuple(what for what, rule in rules.items() if step in self._answers[rule])

    def is_used(self, mark: int) -> bool:
        """Whether a sparse step comes after a measurement."""
        return mark >= 0 and (self._last_sparse is None or mark < self._last_sparse)

    def _may(self, rule: Overlap) -> frozenset[int]:
        """Steps at which a fall of the overlap may be answered."""
        first = self.first_sparse - 1
        fallen = {first: 0}  # measurements -> how many times, at least, it has fallen by then
        for step in range(first + 2, self.total or 0):
            looked = step - 1
            before = [n for base, n in fallen.items() if base < looked and (looked - base) % rule.every == 0]
            allowed = before and (rule.most is None or min(before) < rule.most)
            if allowed and not self.is_dense(looked) and self.is_used(step):
                fallen[step] = min(before) + 1
        return frozenset(fallen) - {first}

    def _fixed(self, step: int) -> bool:
        """Whether `first`, `last` or `sigma_above` wants a step dense."""
        if step < self._first or (self.total is not None and step >= self.total - self._last):
            return True
        if self.dense.sigma_above is None or not self.sigmas:
            return False
        return self.sigmas[min(step, len(self.sigmas) - 1)] >= self.dense.sigma_above

    def _count(self, name: str) -> int:
        value: int | float = getattr(self.dense, name)
        if value == 0:
            return 0
        if self.total is not None:
            return value if isinstance(value, int) else math.floor(value * self.total + 0.5)
        if name == "first" and isinstance(value, int):
            return value
        lead = f"dense_steps={value}" if name == "first" else f"dense_steps: {name}={value}"
        what = "a share of the run's steps" if isinstance(value, float) else "counted from the end of the run"
        raise ValueError(
            f"{lead} is {what}, and their number is not known here "
            "(a bare model, or a pipeline that does not tell); give a number: sparsify(..., dense_steps=3)"
        )


def _is_amount(value: object) -> bool:
    return (type(value) is int and value >= 0) or (isinstance(value, float) and 0 <= value < 1)


def _amount(value: int | float) -> str:
    if isinstance(value, float):
        return f"{value:.0%} of the steps"
    return f"{value} step" + "s" * (value != 1)
