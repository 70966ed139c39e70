"""Spans: the time of calls on a device, added up without waiting for the device between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")


class Spans:
    """Adds up the time of calls.

    On a CPU a call is timed by the clock. An accelerator works while the host goes on, so there events are put before
    and after each call, and read at the end: a wait on each side would count as time of the call.

    Attributes:
        calls: how many were timed.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.calls = 0
        self._seconds = 0.0
        self._open: list[tuple[torch.Event, torch.Event]] = []

    def time(self, call: Callable[[], _T], device: torch.device) -> _T:
        """Make a call and time it.

        Args:
            call: what is timed.
            device: where it runs.

        Returns:
            What the call returned.
        """
        self.calls += 1
        if device.type == "cpu":
            started = time.perf_counter()
            out = call()
            self._seconds += time.perf_counter() - started
            return out
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record(torch.accelerator.current_stream(device))
        out = call()
        end.record(torch.accelerator.current_stream(device))
        self._open.append((begin, end))
        return out

    @property
    def seconds(self) -> float:
        """Of all calls so far; waits for those that still run."""
        for begin, end in self._open:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._open.clear()
        return self._seconds
