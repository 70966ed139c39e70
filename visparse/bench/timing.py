"""Time calls fairly: in shuffled rounds, with a cold cache, against a deadline."""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
_AHEAD = 1_000_000  # GPU cycles of waiting (about half a millisecond), so that the launch is queued when they end


class Deadline:
    """A bound on the time of a whole command.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        """Start the clock."""
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left; negative when it is over."""
        return self._end - time.monotonic()


class Stopwatch:
    """Times one call, in milliseconds; on CUDA with events, after the L2 cache was overwritten.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Prepare what overwrites the cache."""
        self.device = torch.device(device)
        self._flush: torch.Tensor | None = None
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=self.device)

    def milliseconds(self, call: Call) -> float:
        """Run a call once."""
        if self._flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def median(self, call: Call, repeats: int, *, before: Call = lambda: None) -> float:
        """Median milliseconds of a call; one run more, the first, does not count.

        Args:
            call: what is timed, each time once the device is idle.
            repeats: runs that count, at least 1.
            before: called before each run, and not timed.
        """
        times = []
        for _ in range(repeats + 1):
            before()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(self.milliseconds(call))
        return statistics.median(times[1:])


def time_rounds(
    calls: Mapping[str, Call], watch: Stopwatch, *, rounds: int, deadline: Deadline, seed: int
) -> dict[str, list[float]]:
    """Time every call once a round, in an order that is drawn anew for each round.

    Args:
        calls: name -> call; all of them have run before.
        watch: the clock.
        rounds: at most so many.
        deadline: no round begins after it.
        seed: of the orders.

    Returns:
        Name -> milliseconds of each round.
    """
    draw = random.Random(seed)
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        if deadline.remaining <= 0:
            break
        draw.shuffle(names)
        for name in names:
            taken[name].append(watch.milliseconds(calls[name]))
    return taken


def clock_mhz(device: torch.device | str) -> int | None:
    """Clock of the GPU now, in MHz; None on a CPU, or where pynvml is not installed or does not tell."""
    if torch.device(device).type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    try:
        return int(torch.cuda.clock_rate(device))
    except Exception:  # a driver that does not tell raises errors of pynvml's own
        return None
