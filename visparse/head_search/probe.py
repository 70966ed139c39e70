"""Probe: what attention really takes on this device in this model, and costs brought to that.

Rates say what blocks cost. What a call takes besides (launches, proxies, adding a residual) depends on the model and
the host, so two plans of each family run for a few steps, and a line through both is laid: milliseconds of a call =
`call` + `factor` * what the rates say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from visparse.adapter import find_denoisers
from visparse.compensation import Proxies
from visparse.head_search.candidates import Candidate, Candidates, compensations
from visparse.head_search.costs import Costs
from visparse.measure.timing import CallClock
from visparse.patterns import Dense, Pattern, Selector, Skip
from visparse.plan import SparsePlan
from visparse.route import LayerRoute, LayerStats
from visparse.session import session_of
from visparse.templates import PatternTemplate

STEPS = 4  # one dense, where something must be measured, and sparse ones
_LOW, _HIGH = 0.08, 0.5  # shares of dense attention that the two plans should take


@dataclass(frozen=True)
class Line:
    """Milliseconds of one call of a layer for one sequence: `call` + `factor` * predicted milliseconds of its heads."""

    call: float
    factor: float


@dataclass(frozen=True)
class Bench:
    """What the probe runs.

    Attributes:
        target: a diffusers pipeline or a denoiser, dense.
        run: makes `STEPS` steps.
        layers, heads, batch: of a call of the denoiser.
        dense: seconds of dense attention of all layers in a call.
        timer: gives the seconds of a call as the target is now, such as replays of a CUDA graph; None: the calls of
            `run` are timed.
    """

    target: Any
    run: Callable[[], Any]
    layers: int
    heads: int
    batch: int
    dense: float
    timer: Callable[[], float] | None = None

    def besides(self, device: torch.device) -> float:
        """Seconds of a dense call besides attention."""
        return max(0.0, self.seconds_of_calls(device) - self.dense)

    def seconds_of_calls(self, device: torch.device) -> float:
        """What the timer says; else the median of the calls after the first step of a run, the first run left out."""
        if self.timer is not None:
            return self.timer()
        self.run()
        with CallClock([module for module, _ in find_denoisers(self.target).values()], device) as clock:
            self.run()
        return median(clock.seconds[len(clock.seconds) // STEPS :])


def probe(bench: Bench, candidates: Candidates, costs: Costs, device: torch.device) -> dict[str, Line]:
    """Measure two plans of each family.

    On a CPU the calls of attention are timed. An accelerator works while the host goes on, so there, and wherever the
    bench has a timer, whole calls of the denoiser are timed, and what a dense one takes besides attention is taken off.

    Args:
        bench: what is run.
        candidates: what heads may do.
        costs: by rates alone.
        device: of the model.

    Returns:
        family -> line; families without two candidates of different cost are left out.
    """
    import visparse

    found = {}
    by_layers = device.type == "cpu" and bench.timer is None
    besides = 0.0 if by_layers else bench.besides(device)
    for family in dict.fromkeys(one.family for one in candidates.kept):
        places = _places(candidates, costs, family)
        if len(places) < 2:
            continue
        points = []
        for place in places:
            one = candidates.kept[place]
            if by_layers:
                spent = _timed_layers(bench, one, candidates.proxies)
            else:
                with visparse.sparsify(bench.target, uniform_plan(one, candidates.proxies)):
                    spent = 1000 * (bench.seconds_of_calls(device) - besides) / bench.layers
            points.append((bench.heads * costs.milliseconds[place], max(spent, 0.0) / bench.batch))
        found[family] = line_through(*points)
    return found


def _timed_layers(bench: Bench, candidate: Candidate, proxies: Proxies) -> float:
    """Mean milliseconds of a sparse call of a layer where all heads have one candidate, in a second run."""
    import visparse

    with visparse.sparsify(bench.target, uniform_plan(candidate, proxies), timing=True):
        bench.run()
        routes = _routes(bench.target)
        for route in routes:
            route.stats = LayerStats()
        bench.run()
        seconds, calls = (sum(getattr(route.stats, name) for route in routes) for name in ("sparse_seconds", "sparse"))
    if not calls:
        raise RuntimeError(f"probe: no call was served sparsely under {candidate.name!r}, so nothing was measured")
    return 1000 * seconds / calls


def uniform_plan(candidate: Candidate, proxies: Proxies) -> SparsePlan:
    """A plan in which all heads do the same."""
    pooled, residual = compensations(candidate.family, None, proxies)
    pattern: Pattern = candidate.pattern
    if isinstance(pattern, Selector) and pattern.reused:
        pattern = replace(pattern, refresh=None)
    return SparsePlan(
        name="probe",
        patterns={"all": PatternTemplate(pattern.to_dict())},
        default="all",
        dense_steps=1 if candidate.family == "foveal" else 0,
        proxies=pooled,
        residual=residual,
    )


def line_through(low: tuple[float, float], high: tuple[float, float]) -> Line:
    """A line through two points (predicted, measured); its parts are never below 0.

    Args:
        low, high: milliseconds of a call.
    """
    (x0, y0), (x1, y1) = low, high
    factor = (y1 - y0) / (x1 - x0)
    call = y0 - factor * x0
    if call < 0 or factor <= 0:  # noise: a factor alone
        return Line(0.0, (y0 + y1) / (x0 + x1))
    return Line(call, factor)


def corrected(costs: Costs, candidates: Sequence[Candidate], lines: Mapping[str, Line], dense: float | None) -> Costs:
    """Costs as they are on this device in this model.

    Args:
        costs: by rates alone.
        candidates: what they are of.
        lines: from `probe`.
        dense: measured milliseconds of dense attention for one head of one layer; None: not measured.
    """
    if not lines and dense is None:
        return costs
    times = tuple(
        time * lines[one.family].factor if one.family in lines else time
        for one, time in zip(candidates, costs.milliseconds, strict=True)
    )
    parts = [f"{family} {line.factor:.2f} of the rates and {line.call:.3g} ms a call" for family, line in lines.items()]
    return replace(
        costs,
        milliseconds=times,
        dense=costs.dense if dense is None else dense,
        call={family: line.call for family, line in lines.items()},
        source=f"{costs.source}; brought to this model by two plans of each family: {', '.join(parts)}",
    )


def _places(candidates: Candidates, costs: Costs, family: str) -> list[int]:
    """Two candidates, one near `_LOW` and one near `_HIGH` of dense attention's time."""
    usable = [p for p in candidates.of(family) if not isinstance(candidates.kept[p].pattern, (Dense, Skip))]
    if family != "plain":  # what choosing tiles costs belongs to it
        usable = [p for p in usable if isinstance(candidates.kept[p].pattern, Selector)] or usable
    near = [
        min(usable, key=lambda p: abs(costs.milliseconds[p] - share * costs.dense), default=None)
        for share in (_LOW, _HIGH)
    ]
    found = [place for place in dict.fromkeys(near) if place is not None]
    if len({costs.milliseconds[place] for place in found}) == 2:
        return found
    ends = sorted(usable, key=lambda p: costs.milliseconds[p])[:: max(len(usable) - 1, 1)]  # short sequences: all dear
    return ends if len({costs.milliseconds[place] for place in ends}) == 2 else []


def _routes(target: Any) -> list[LayerRoute]:
    """The routes of all denoisers that are sparsified now."""
    sessions = [session_of(module) for module, _ in find_denoisers(target).values()]
    return [route for session in sessions if session is not None for route in session.router.routes]
