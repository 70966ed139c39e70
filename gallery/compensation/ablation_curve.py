"""The rival of every plan: dense attention with fewer steps, at equal time or at equal quality."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """A dense run with fewer steps.

    Args:
        steps: that it made.
        seconds: of its denoiser steps.
        psnr: against the full dense run, in dB.
    """

    steps: int
    seconds: float
    psnr: float


def psnr_at(seconds: float, curve: Sequence[Point]) -> float | None:
    """PSNR of dense attention with as many steps as fit into a time, linear between the measured numbers of steps.

    Args:
        seconds: of denoiser steps.
        curve: at least two runs.

    Returns:
        dB; that of the run with most steps where the time is longer, and None where it is shorter than that of the
        run with the fewest.
    """
    points = sorted(curve)
    if len(points) < 2 or seconds < points[0].seconds:
        return None
    for low, high in pairwise(points):
        if low.seconds <= seconds <= high.seconds:
            part = (seconds - low.seconds) / ((high.seconds - low.seconds) or 1.0)
            return low.psnr + part * (high.psnr - low.psnr)
    return points[-1].psnr


def steps_for(psnr: float, curve: Sequence[Point]) -> float | None:
    """Dense steps that give a PSNR, linear between the measured numbers of steps.

    Args:
        psnr: in dB.
        curve: at least two runs.

    Returns:
        A number of steps; that of the longest run of the curve where none is as good (dense needs at least as many),
        and None where all are better.
    """
    points = sorted(curve)
    if len(points) < 2 or psnr < points[0].psnr:
        return None
    for low, high in pairwise(points):
        if low.psnr <= psnr <= high.psnr:
            return low.steps + (psnr - low.psnr) / ((high.psnr - low.psnr) or 1.0) * (high.steps - low.steps)
    return float(points[-1].steps)


def share_from_which_it_wins(cost: float, equal_steps: float, steps: int) -> float | None:
    """The share of a dense step that attention must take for a plan to beat dense with fewer steps.

    With attention at the share a of a step, the plan takes 1 - a + a * cost of the full dense run, and its rival
    equal_steps / steps. They are equal at a = (1 - equal_steps / steps) / (1 - cost).

    Args:
        cost: time of all attention of the plan's run, measuring and selecting counted, over that of the dense run.
        equal_steps: dense steps that give the plan's quality, from `steps_for`.
        steps: of the full run.

    Returns:
        A share in [0, 1]; None where the plan loses at any share.
    """
    if cost >= 1:
        return None
    share = max(0.0, (1 - equal_steps / steps) / (1 - cost))
    return share if share <= 1 else None
