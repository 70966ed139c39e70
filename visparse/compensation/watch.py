"""Watch: follows the overlap over a run, and says at which steps choices of tiles are made again."""

from __future__ import annotations

import torch
from torch import Tensor

from visparse.compensation.refresh import Overlap
from visparse.schedule import Timetable


class Watch:
    """The overlap of one denoiser's choices, in one run.

    Attributes:
        rule: of the plan.
        looking: whether the present step is one at which layers look.
        refreshed: steps of the run at which what goes by the overlap is measured again, ascending.
        overlaps: step -> mean overlap that was found there.
    """

    def __init__(self, rule: Overlap) -> None:
        """Follow a rule; no run has begun."""
        self.rule = rule
        self.looking = False
        self.refreshed: list[int] = []
        self.overlaps: dict[int, float] = {}
        self._sums: list[Tensor] = []
        self._count = 0
        self._step: int | None = None

    def begin_run(self) -> None:
        """Forget the run before."""
        self.drop()
        self.refreshed, self.overlaps, self._step = [], {}, None

    def drop(self) -> None:
        """Forget what was found at the present step."""
        self._sums, self._count = [], 0

    def begin_step(self, step: int, table: Timetable) -> None:
        """Decide, from what was found at the step before, whether this one is measured; waits for the device once.

        Args:
            step: of the run.
            table: of the run.
        """
        if self._sums and self._step is not None:
            parts = torch.stack([part.to(self._sums[0].device) for part in self._sums])
            self.overlaps[self._step] = float(parts.sum()) / self._count
            if self.overlaps[self._step] < self.rule.below and self._allowed(step, table):
                self.refreshed.append(step)
        self.drop()
        self._step = step
        since = step - max([table.first_sparse - 1, *self.refreshed])
        self.looking = since > 0 and since % self.rule.every == 0 and self._allowed(step + 1, table)

    def note(self, shares: Tensor) -> None:
        """Add what a layer found.

        Args:
            shares: any shape, in [0, 1].
        """
        self._sums.append(shares.sum(dtype=torch.float32))
        self._count += shares.numel()

    def latest(self, scheduled: int) -> int:
        """The latest measurement of what goes by the overlap.

        Args:
            scheduled: the one that the plan's schedule gives.
        """
        return max([scheduled, *self.refreshed])

    def _allowed(self, step: int, table: Timetable) -> bool:
        """Whether there may be one more measurement, at a step."""
        return table.is_used(step) and (self.rule.most is None or len(self.refreshed) < self.rule.most)
