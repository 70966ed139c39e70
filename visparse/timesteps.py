"""The timesteps that a scheduler was set to, and which step of a run each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from visparse.schedule import Sigmas

_ROUNDING = 0.004  # bfloat16 keeps 8 bits: a timestep that went through it is off by at most 1/512
_SMALL = 1e-4  # of the largest timestep


@dataclass(frozen=True, eq=False)
class Timesteps:
    """The timesteps of a scheduler, each with its step.

    A step is what the user asked for when he gave a number of steps. Schedulers of second order call the denoiser twice
    a step: those of Heun's kind repeat a timestep, so calls at one timestep are one step; those with a timestep of its
    own for the second call (KDPM2) have two timesteps to a step.

    Attributes:
        values: all timesteps, falling, but for rounding.
        steps: step of each.
        sigmas: noise level of each step, as the scheduler has it; None where it has none.
        largest: the number of timesteps in training; pipelines may divide by it.
    """

    values: tuple[float, ...]
    steps: tuple[int, ...]
    sigmas: Sigmas | None
    largest: float

    @classmethod
    def of(cls, scheduler: Any) -> Timesteps | None:
        """Read a scheduler; None where it has not been set, or has no timesteps. Waits for its device once."""
        count = getattr(scheduler, "num_inference_steps", None)
        values = getattr(scheduler, "timesteps", None)
        if not isinstance(count, int) or values is None or not len(values):
            return None
        values = tuple(float(value) for value in values.tolist())
        steps = _steps(values, getattr(scheduler, "order", 1), hasattr(scheduler, "step_index"))
        sigmas = getattr(scheduler, "sigmas", None)
        levels = None
        if sigmas is not None and len(sigmas) >= len(values):
            levels = tuple(float(sigmas[steps.index(step)]) for step in range(steps[-1] + 1))
        config = getattr(scheduler, "config", {})
        return cls(values, steps, levels, float(config.get("num_train_timesteps") or 1.0))

    @property
    def room(self) -> float:
        """By how much timesteps may differ that are meant to be equal: KDPM2's ancestral form interpolates them."""
        return _SMALL * max(map(abs, self.values))

    def begin(self, timestep: float, index: int | None) -> tuple[int, float] | None:
        """Where a run begins: behind the first timestep for images from images.

        Args:
            timestep: the first one, as the denoiser got it.
            index: where the pipeline told the scheduler to begin; None where it did not.

        Returns:
            Place among the timesteps, and by what the pipeline divides them (1 or `largest`); None where the timestep
            is none of them.
        """
        divided = timestep <= 1 and max(self.values) > 2
        scales = (self.largest, 1.0) if divided else (1.0,)
        for scale in scales:
            if index is not None and 0 <= index < len(self.values) and self._near(timestep * scale, index):
                return index, scale
        for scale in scales:
            place = self.find(timestep * scale, None)
            if place is not None:
                return place, scale
        return None

    def find(self, timestep: float, index: int | None, after: int = 0) -> int | None:
        """The place of a timestep; None where it is none of them.

        Args:
            timestep: as the denoiser got it, times what the pipeline divides by.
            index: where the scheduler says it is; believed where the timestep there is this one. Of two timesteps that
                are equal after rounding only this tells which is meant.
            after: where the run was last.
        """
        if index is not None and 0 <= index < len(self.values) and self._near(timestep, index):
            return index
        best = min(range(after, len(self.values)), key=lambda place: abs(self.values[place] - timestep))
        return best if self._near(timestep, best) else None

    def rest(self, first: int) -> tuple[int, Sigmas | None]:
        """Number and noise levels of the steps from `first` on."""
        return self.steps[-1] + 1 - first, None if self.sigmas is None else self.sigmas[first:]

    def _near(self, timestep: float, place: int) -> bool:
        value = self.values[place]
        return abs(timestep - value) <= _ROUNDING * abs(value) + self.room


def _steps(values: tuple[float, ...], order: int, indexed: bool) -> tuple[int, ...]:
    """The step of each timestep; `indexed`: the scheduler itself counts them."""
    if order == 1 and indexed:
        return tuple(range(len(values)))
    stretches, room = [0], _SMALL * max(map(abs, values))
    for before, value in pairwise(values):
        stretches.append(stretches[-1] + (abs(value - before) > room))
    if order > 1 and stretches[-1] + 1 > -(-len(values) // order):
        return tuple(place // order for place in range(len(values)))
    return tuple(stretches)
