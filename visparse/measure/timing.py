"""Time of one generation, split into text, denoiser steps and decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import nn


class StepClock:
    """Times the parts of one pipeline call; use it as a context manager around the call.

    Pass `on_step_end` as the pipeline's `callback_on_step_end`. It keeps the latents of the last step too.

    Args:
        denoisers: the modules whose first call starts the first step.
        device: torch device of the pipeline. On CUDA the clock waits for it at the end of each step.
        tick: called after every step, for a progress bar.
    """

    def __init__(
        self, denoisers: Iterable[nn.Module], device: torch.device, tick: Callable[[], None] | None = None
    ) -> None:
        """Watch nothing yet."""
        self._denoisers = tuple(denoisers)
        self._device = device
        self._tick = tick
        self._hooks: list[Any] = []
        self._marks: list[float] = []
        self._begin = self._end = 0.0
        self.latents: torch.Tensor | None = None

    def __enter__(self) -> StepClock:
        """Watch the denoisers and start."""
        for module in self._denoisers:
            self._hooks.append(module.register_forward_pre_hook(self._first_call))
        self._begin = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._end = self._now()

    def on_step_end(self, pipe: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's call-back: notes the time and the latents."""
        self._marks.append(self._now())
        self.latents = values["latents"].detach()
        if self._tick is not None:
            self._tick()
        return {}

    @property
    def steps(self) -> int:
        """Denoiser steps that were made."""
        return max(len(self._marks) - 1, 0)

    @property
    def seconds_of_steps(self) -> list[float]:
        """Each denoiser step, scheduler included; the first one begins with the first call of a denoiser."""
        return [end - begin for begin, end in pairwise(self._marks)]

    @property
    def seconds(self) -> float:
        """End to end: text, steps, decoding."""
        return self._end - self._begin

    @property
    def seconds_text(self) -> float:
        """From the call to the first denoiser call: text encoder, first noise."""
        return self._mark(0) - self._begin

    @property
    def seconds_denoise(self) -> float:
        """All denoiser steps, scheduler included."""
        return self._mark(-1) - self._mark(0)

    @property
    def seconds_decode(self) -> float:
        """From the last step to the end: decoder, copying the frames."""
        return self._end - self._mark(-1)

    def _first_call(self, module: nn.Module, inputs: object) -> None:
        if not self._marks:
            self._marks.append(self._now())

    def _mark(self, index: int) -> float:
        if len(self._marks) < 2:
            raise RuntimeError("no denoiser step was seen: the pipeline never called the modules that were given")
        return self._marks[index]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class CallClock:
    """Times every call of some modules; on an accelerator it waits before and after each call, never inside.

    Attributes:
        seconds: of each call, in their order.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """Watch nothing yet.

        Args:
            modules: to be timed.
            device: where they run.
        """
        self._modules, self._device = tuple(modules), device
        self._hooks: list[Any] = []
        self._begun = 0.0
        self.seconds: list[float] = []

    def __enter__(self) -> CallClock:
        """Watch the modules."""
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(self._before))
            self._hooks.append(module.register_forward_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, inputs: object) -> None:
        self._begun = self._now()

    def _after(self, module: nn.Module, inputs: object, output: object) -> None:
        self.seconds.append(self._now() - self._begun)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
