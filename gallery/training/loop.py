"""What the two training loops share: the time they run for, the learning rate's schedule, and means for the log."""

import math
import time
from collections.abc import Iterator

import torch
from parallel import same_clock


def until(seconds: float, device: torch.device) -> Iterator[float]:
    """Seconds since the start, once a step, until `seconds` have passed; all processes stop at the same step."""
    start = time.time()
    while (passed := same_clock(time.time() - start, device)) < seconds:
        yield passed


def schedule(fraction: float, step: int, *, warm: int = 100, decay: float = 0.45, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, constant, cosine over the last `decay` of the time.

    Args:
        fraction: of the time, 0 to 1.
        step: steps done.
        warm: steps of the warm-up.
        decay: share of the time over which the rate falls, more than 0.
        floor: the least that the cosine falls to.
    """
    down = 1.0 if fraction < 1 - decay else 0.5 * (1 + math.cos(math.pi * (fraction - 1 + decay) / decay))
    return min(1.0, (step + 1) / warm) * max(floor, down)


class Meter:
    """Mean of a value and of the time a step, since the last reading. Values stay on their device until read."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.since = time.time()

    def add(self, value: torch.Tensor) -> None:
        """Count one step."""
        self.values.append(value.detach())

    def read(self) -> tuple[float, float]:
        """Mean value, and milliseconds a step; starts anew."""
        mean = float(torch.stack(self.values).mean())
        milliseconds = (time.time() - self.since) / len(self.values) * 1000
        self.values, self.since = [], time.time()
        return mean, milliseconds
