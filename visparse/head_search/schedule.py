"""Schedule: which steps of a run are dense, measured and sparse, and what a wish of speed leaves for attention."""

from __future__ import annotations

from dataclasses import dataclass

from visparse.compensation import ReuseResidual
from visparse.compensation.refresh import parse_refresh, refresh_steps
from visparse.explain_costs import SCORES_SHARE
from visparse.head_search.capture import Calibration
from visparse.patterns import Dense
from visparse.plan import SparsePlan


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of the runs of a family's plans.

    Attributes:
        total: steps of a run.
        sparse: the sparse steps.
        measured: dense steps at which something is measured; in the foveal family only.
        starts: first steps of the ranges that are allocated each on its own; a range ends where the next one starts.
    """

    total: int
    sparse: tuple[int, ...]
    measured: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    def range_of(self, step: int) -> int:
        """The range that a step lies in."""
        return sum(step >= start for start in self.starts) - 1

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of the sparse steps that lies in each range."""
        counts = [0] * len(self.starts)
        for step in self.sparse:
            counts[self.range_of(step)] += 1
        return tuple(count / len(self.sparse) for count in counts)

    @property
    def dense(self) -> int:
        """Number of dense steps, measured ones too."""
        return self.total - len(self.sparse)

    def ceiling(self, share: float) -> float:
        """Speed-up of a run whose sparse attention costs nothing.

        Args:
            share: of attention in a dense step.
        """
        fixed = self.total * (1 / share - 1) + self.dense + SCORES_SHARE * len(self.measured)
        return self.total / share / fixed

    def attention_for(self, speedup: float, share: float) -> float:
        """Time that attention may take in a sparse step, as a share of dense attention; below 0: impossible.

        Args:
            speedup: of the denoising of a whole run.
            share: of attention in a dense step.
        """
        fixed = self.total * (1 / share - 1) + self.dense + SCORES_SHARE * len(self.measured)
        return (self.total / share / speedup - fixed) / (len(self.sparse) + len(self.measured))

    def speedup_at(self, attention: float, share: float) -> float:
        """The other way round: speed-up of a run whose sparse attention takes a share of dense attention."""
        fixed = self.total * (1 / share - 1) + self.dense + SCORES_SHARE * len(self.measured)
        return self.total / share / (fixed + attention * (len(self.sparse) + len(self.measured)))


def make_schedule(
    family: str, total: int, dense_steps: int | float, refresh: float | int | None, *, ranges: bool = False
) -> Schedule:
    """The steps of a family's plans.

    Args:
        family: ``"plain"``, ``"foveal"`` or ``"pooled"``.
        total: steps of a run.
        dense_steps: a number, or a share of the run.
        refresh: when the foveal family measures again.
        ranges: cut the run into ranges of steps: where the foveal family measures again, since choices by content
            cannot change without that. Other families are cut at the same steps.

    Raises:
        ValueError: no step would be sparse, or none dense.
    """
    residual = ReuseResidual(refresh=refresh) if family == "foveal" else None
    plan = SparsePlan(name="x", patterns={"x": Dense()}, default="x", dense_steps=dense_steps, residual=residual)  # type: ignore[dict-item]
    all_dense = plan.check_run(total)
    table = plan.timetable(total)
    measured = tuple(plan.measure_steps(total).get("residual", ()))
    sparse = tuple(step for step in range(total) if not table.scheduled(step) and step not in measured)
    if all_dense is not None or not sparse:
        raise ValueError(f"dense_steps: no step of {total} would be sparse with {dense_steps}; use fewer dense steps")
    starts: tuple[int, ...] = (0,)
    if ranges:
        starts = _starts(total, dense_steps, refresh, sparse)
    return Schedule(total=total, sparse=sparse, measured=measured, starts=starts)


def _starts(
    total: int, dense_steps: int | float, refresh: float | int | None, sparse: tuple[int, ...]
) -> tuple[int, ...]:
    """First steps of the ranges, the same for all families; each has a sparse step in each of them."""
    again = refresh_steps(parse_refresh(refresh), sparse[0] - 1, total) or ()
    if sparse[0]:
        measured = make_schedule("foveal", total, dense_steps, refresh)
        again, sparse = measured.measured, measured.sparse
    starts = [0]
    for start in again:
        if not any(starts[-1] <= step < start for step in sparse):
            continue
        if any(step >= start for step in sparse):
            starts.append(start)
    return tuple(starts)


def calibrate(schedule: Schedule, judge: int) -> Calibration:
    """Pick the steps at which candidates are scored: spread over the sparse ones, the first and the last among them.

    Args:
        schedule: of the foveal family, or of the plain one where it is alone.
        judge: how many.
    """
    steps, count = schedule.sparse, min(judge, len(schedule.sparse))
    places = {round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)}
    return Calibration(
        total=schedule.total,
        measure=frozenset(schedule.measured),
        judge=frozenset(steps[place] for place in places),
    )
