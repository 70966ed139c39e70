"""Time of a published depth from the times of a few blocks.

A forward of a model with n blocks of a kind takes a + b * n seconds. It is timed with one block of each kind, then with
more blocks of one kind at a time; a and b follow, and with them the time of all blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from visparse.bench.models import Architecture
from visparse.bench.step_build import Depth


def depths(model: Architecture, layers: int) -> list[Depth]:
    """One block of each kind, then `layers` blocks of one kind at a time."""
    ones = (1,) * len(model.blocks)
    return [ones, *((*ones[:i], layers, *ones[i + 1 :]) for i in range(len(ones)))]


def scale_up(points: Sequence[Depth], seconds: Sequence[float], published: Sequence[int]) -> tuple[float, list[float]]:
    """Time of the published depth, from the times of `depths`.

    Args:
        points: depths; the first has one block of each kind, the others more of one kind.
        seconds: time of each.
        published: blocks of each kind in the published model.

    Returns:
        Seconds of the whole forward; seconds of one block of each kind.

    Raises:
        ValueError: more blocks did not take longer.
    """
    per_block = [
        (more - seconds[0]) / (point[kind] - 1)
        for kind, (point, more) in enumerate(zip(points[1:], seconds[1:], strict=True))
    ]
    outside = seconds[0] - sum(per_block)
    if min(per_block) <= 0:
        raise ValueError(
            f"time does not grow with depth: {[round(x, 6) for x in seconds]} s at depths {list(points)}; "
            "the machine is too busy, or the model too small: use more repeats or layers"
        )
    return outside + sum(b * count for b, count in zip(per_block, published, strict=True)), per_block


def time_once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
