"""Where a run is: step, number of steps, branch of guidance.

Two sources, in this order:

1. The pipeline's cache context (`model.cache_context("cond", step_index=i, num_inference_steps=n)`), where it gives a
   step.
2. The `timestep` argument of the denoiser: the step goes on when it falls, a new run begins when it rises. This reads
   one number from the device, so it is done only where the first source is silent and the plan needs the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class SchedulerSteps:
    """The number of steps as a pipeline's scheduler knows it, for pipelines that do not pass it on.

    Holds the pipeline weakly: a denoiser that is copied or pickled alone leaves it behind.
    """

    def __init__(self, pipeline: object | None = None) -> None:
        """Watch `pipeline.scheduler`; with None the number stays unknown."""
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)

    def total(self) -> int | None:
        """Steps of the run for which the scheduler was set last, or None."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        total = getattr(getattr(pipeline, "scheduler", None), "num_inference_steps", None)
        return total if isinstance(total, int) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerSteps:
        """Follow the pipeline's copy where it is being copied too, else forget it."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        return SchedulerSteps(memo.get(id(pipeline)))

    def __reduce__(self) -> tuple[type[SchedulerSteps], tuple[()]]:
        """Pickle without the pipeline."""
        return SchedulerSteps, ()


@dataclass
class Clock:
    """The place in the current run; shared by all denoisers of one pipeline.

    Attributes:
        stage_of: function (step, total) -> first step of the stretch in which the plan does not change.
        scheduler: the pipeline's own number of steps.
        step: index of the current step, None while unknown.
        total: number of steps of the run, None while unknown.
        branch: name of the pipeline's cache context (`"cond"`, `"uncond"`, ...), None where it gives none.
        source: `"cache context"`, `"timestep"` or None.
        runs: number of runs begun since `sparsify`.
        stage: `stage_of` the current step. It changes seldom, so compiled code may depend on it.
    """

    stage_of: Callable[[int, int | None], int]
    scheduler: SchedulerSteps = field(default_factory=SchedulerSteps)
    step: int | None = None
    total: int | None = None
    branch: str | None = None
    source: str | None = None
    runs: int = 0
    stage: int | None = None
    _given: bool = False
    _seen: set[str | None] = field(default_factory=set)
    _timestep: float | None = None

    def enter(self, context: Any) -> None:
        """Take what a cache context says; called before and (with None) after every call of the denoiser.

        Args:
            context: diffusers' `CacheContext`, the bare name that older releases pass, or None.
        """
        if context is None:
            self._given, self.branch = False, None
            return
        self.branch = context if isinstance(context, str) else context.name
        step = getattr(context, "step_index", None)
        self._given = step is not None
        if step is None:
            return
        if self.step is None or step < self.step or (step == self.step and self.branch in self._seen):
            self._begin()
        if step != self.step:
            self._seen.clear()
        self._seen.add(self.branch)
        self.step, self.source = step, "cache context"
        self.total = getattr(context, "num_inference_steps", None) or self.scheduler.total()
        self.stage = self.stage_of(self.step, self.total)

    @property
    def given(self) -> bool:
        """Whether the pipeline's cache context gives the step of the present call."""
        return self._given

    def tick(self, timestep: object) -> None:
        """Find the step from the denoiser's timestep; does nothing where the cache context gave it.

        Args:
            timestep: number, or tensor of any shape (its largest entry counts: conditioning frames carry 0), or None.
        """
        if self._given:
            return
        if timestep is None:
            self.step = self.stage = self.source = None
            return
        now = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)  # type: ignore[arg-type]
        if self.step is None or self._timestep is None or now > self._timestep:
            self._begin()
            self.step = 0
        elif now < self._timestep:
            self.step += 1
        self._timestep, self.source = now, "timestep"
        self.total = self.scheduler.total()
        self.stage = self.stage_of(self.step, self.total)

    def end_run(self) -> None:
        """Forget the run: the next call begins a new one."""
        self.step = self.stage = self._timestep = None
        self._seen.clear()

    def _begin(self) -> None:
        self.runs += 1
        self._seen.clear()
