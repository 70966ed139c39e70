"""Where a run is: step, number of steps, branch of guidance.

Two sources, in this order:

1. The pipeline's cache context (`model.cache_context("cond", step_index=i, num_inference_steps=n)`), where it gives a
   step.
2. The `timestep` argument of the denoiser: its place among the timesteps of the pipeline's scheduler; where that is not
   known the step goes on when it falls. A new run begins when it rises, or when the scheduler was set again. This reads
   one number from the device, so it is done only where the first source is silent and the plan needs the step.

What a step is, where a scheduler calls the denoiser more than once a step, `visparse.timesteps` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from visparse.schedule import MissingSigmasError, Sigmas
from visparse.timesteps import Timesteps


class SchedulerSteps:
    """What a pipeline's scheduler knows of the run: timesteps, their number, and where it is.

    Holds the pipeline weakly: a denoiser that is copied or pickled alone leaves it behind.
    """

    def __init__(self, pipeline: object | None = None) -> None:
        """Watch `pipeline.scheduler`; with None nothing is known."""
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._read: tuple[object, Timesteps | None] = None, None

    def total(self) -> int | None:
        """Steps of the run for which the scheduler was set last, or None."""
        total = getattr(self._scheduler, "num_inference_steps", None)
        return total if isinstance(total, int) else None

    def timesteps(self) -> Timesteps | None:
        """The timesteps that the scheduler was set to last; another object once it is set again. None: not known."""
        scheduler = self._scheduler
        values = getattr(scheduler, "timesteps", None)
        if values is not self._read[0]:
            self._read = values, Timesteps.of(scheduler)
        return self._read[1]

    def index(self) -> int | None:
        """Where among its timesteps the scheduler is; None where it does not tell."""
        index = getattr(self._scheduler, "step_index", None)
        return index if isinstance(index, int) else None

    def begin(self) -> int | None:
        """Where among its timesteps the pipeline told the scheduler to begin; None where it did not."""
        index = getattr(self._scheduler, "begin_index", None)
        return index if isinstance(index, int) else None

    def __str__(self) -> str:
        """Name of the scheduler's class."""
        scheduler = self._scheduler
        return "a bare model" if scheduler is None else type(scheduler).__name__

    @property
    def _scheduler(self) -> Any:
        pipeline = self._pipeline() if self._pipeline is not None else None
        return getattr(pipeline, "scheduler", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerSteps:
        """Follow the pipeline's copy where it is being copied too, else forget it."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        return SchedulerSteps(memo.get(id(pipeline)))

    def __reduce__(self) -> tuple[type[SchedulerSteps], tuple[()]]:
        """Pickle without the pipeline."""
        return SchedulerSteps, ()


class Keeper(Protocol):
    """What keeps something during a run."""

    def rest(self, step: int | None) -> None:
        """Free what is not needed any more; `step` None: the run is over."""


@dataclass
class Clock:
    """The place in the current run; shared by all denoisers of one pipeline.

    Attributes:
        stage_of: function (step, total, sigmas) -> first step of the stretch in which the plan does not change.
        scheduler: of the pipeline.
        step: index of the current step, None while unknown.
        total: number of steps of the run, None while unknown; always above `step`.
        sigmas: noise level of each step of the run, as the scheduler has it; None while unknown.
        branch: name of the pipeline's cache context (`"cond"`, `"uncond"`, ...), None where it gives none.
        source: `"cache context"`, `"timestep"` or None.
        runs: number of runs begun since `sparsify`.
        stage: `stage_of` the current step. It changes seldom, so compiled code may depend on it.
        last: whether the run has no later call, as far as is known.
        keepers: told when the run is over.
    """

    stage_of: Callable[[int, int | None, Sigmas | None], int]
    scheduler: SchedulerSteps = field(default_factory=SchedulerSteps)
    step: int | None = None
    total: int | None = None
    sigmas: Sigmas | None = None
    branch: str | None = None
    source: str | None = None
    runs: int = 0
    stage: int | None = None
    last: bool = False
    keepers: list[Keeper] = field(default_factory=list)
    _given: bool = False
    _seen: set[tuple[str | None, int]] = field(default_factory=set)
    _timestep: float | None = None
    _timesteps: Timesteps | None = None
    _place: int | None = None  # in _timesteps; None where the run does not follow them
    _begin_step: int = 0  # of _timesteps
    _scale: float = 1.0  # by what the pipeline divides timesteps
    _room: float = 0.0  # by how much a timestep may rise within a run

    def enter(self, context: Any) -> None:
        """Take what a cache context says; called before and (with None) after every call of the denoiser.

        Args:
            context: diffusers' `CacheContext`, the bare name that older releases pass, or None.
        """
        if context is None:
            self._given, self.branch = False, None
            return
        self.branch = context if isinstance(context, str) else context.name
        call = getattr(context, "step_index", None)
        self._given = call is not None
        if call is None:
            return
        step, total, sigmas, final = self._of_call(call, getattr(context, "num_inference_steps", None))
        if self.step is None or step < self.step or (self.branch, call) in self._seen:
            self._begin()
        if step != self.step:
            self._seen.clear()
        self._seen.add((self.branch, call))
        self._set(step, total, sigmas, "cache context", final)

    @property
    def given(self) -> bool:
        """Whether the pipeline's cache context gives the step of the present call."""
        return self._given

    @property
    def sigma(self) -> float | None:
        """Noise level of the current step, as the scheduler has it; None while unknown."""
        if self.sigmas is None or self.step is None:
            return None
        return self.sigmas[min(self.step, len(self.sigmas) - 1)]

    def tick(self, timestep: object) -> None:
        """Find the step from the denoiser's timestep; does nothing where the cache context gave it.

        Args:
            timestep: number, or tensor of any shape (its largest entry counts: conditioning frames carry 0), or None.

        Raises:
            ValueError: the plan needs the number of steps, or their noise levels, and they are not known.
        """
        if self._given:
            return
        if timestep is None:
            self.step = self.stage = self.source = None
            return
        now = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)  # type: ignore[arg-type]
        timesteps = self.scheduler.timesteps()
        again = timesteps is not self._timesteps  # the scheduler was set again
        if self.step is None or self._timestep is None or now - self._timestep > self._room or again:
            self._begin()
            self._follow(timesteps, now)
            step, total, sigmas = 0, self.scheduler.total(), None
        else:
            if self._place is not None and timesteps is not None:
                self._place = timesteps.find(now * self._scale, self.scheduler.index(), self._place)
            step, total, sigmas = self.step + (now < self._timestep), self.total, self.sigmas
        if self._place is not None and timesteps is not None:
            step = timesteps.steps[self._place] - self._begin_step
            total, sigmas = timesteps.rest(self._begin_step)
        self._timestep = now
        final = self._place is None or timesteps is None or self._place + 1 == len(timesteps.values)
        self._set(step, total, sigmas, "timestep", final)

    def end_run(self) -> None:
        """Forget the run: the next call begins a new one."""
        self.step = self.stage = self._timestep = None
        self._seen.clear()
        for keeper in self.keepers:
            keeper.rest(None)

    def _begin(self) -> None:
        self.runs += 1
        self._seen.clear()

    def _follow(self, timesteps: Timesteps | None, now: float) -> None:
        """Find where among the scheduler's timesteps a run begins: behind the first one for images from images."""
        self._timesteps, self._place, self._room = timesteps, None, 0.0
        if timesteps is None:
            return
        begin, index = self.scheduler.begin(), self.scheduler.index()
        found = timesteps.begin(now, begin if index is None else index)
        if found is not None:
            self._place, self._scale = found
            self._begin_step = timesteps.steps[self._place]
            self._room = timesteps.room / self._scale

    def _of_call(self, call: int, count: int | None) -> tuple[int, int | None, Sigmas | None, bool]:
        """Step, number of steps and noise levels of a call of the denoiser, and whether it is the scheduler's last."""
        timesteps, begin = self.scheduler.timesteps(), self.scheduler.begin()
        if timesteps is not None:
            if begin is None:
                begin = 0 if count in (None, self.scheduler.total()) else len(timesteps.values) - count
            if begin >= 0 and begin + call < len(timesteps.values):
                first = timesteps.steps[begin]
                final = begin + call + 1 == len(timesteps.values)
                return timesteps.steps[begin + call] - first, *timesteps.rest(first), final
        return call, count or self.scheduler.total(), None, True

    def _set(self, step: int, total: int | None, sigmas: Sigmas | None, source: str, final: bool) -> None:
        self.step, self.sigmas, self.source = step, sigmas, source
        self.total = None if total is None else max(total, step + 1)
        self.last = final and self.step + 1 == self.total
        try:
            self.stage = self.stage_of(step, self.total, sigmas)
        except MissingSigmasError as error:
            timesteps = self.scheduler.timesteps()
            known = timesteps is not None and timesteps.sigmas is not None
            why = "has other timesteps than the denoiser gets" if known else "has no sigmas"
            raise ValueError(f"{error} ({self.scheduler} {why})") from error
