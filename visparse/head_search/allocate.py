"""Allocate: one candidate for each item, so that the sum of errors is least within one budget of cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A candidate for an item: what it costs, and the error that it makes; both at least 0."""

    cost: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What `allocate` found.

    Attributes:
        picks: for each item, the place of its option.
        cost: sum over items.
        error: sum over items.
        bound: no choice within the budget has a smaller sum of errors (linear relaxation).
    """

    picks: tuple[int, ...]
    cost: float
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the error may be above the least one, relative to the bound; 0 is proven optimal."""
        if self.error <= self.bound:
            return 0.0
        return (self.error - self.bound) / self.bound if self.bound > 0 else float("inf")


def allocate(items: Sequence[Sequence[Option]], budget: float) -> Allocation:
    """Choose one option for each item.

    Options on the lower convex hull of each item are taken in the order of error saved per cost (which is what a
    Lagrange multiplier does), until the next one no longer fits; then what is left of the budget is filled with the
    swaps that save the most.

    Args:
        items: the options of each item, at least one.
        budget: of cost.

    Raises:
        ValueError: an item has no option, a number is negative or not finite, or not even the cheapest options fit.
    """
    for index, options in enumerate(items):
        if not options:
            raise ValueError(f"items: wanted at least one option for each, item {index} has none; add the dense one")
        for option in options:
            if not (0 <= option.cost < float("inf") and 0 <= option.error < float("inf")):
                raise ValueError(f"items: wanted finite costs and errors of at least 0, item {index} has {option}")
    hulls = [hull_of(options) for options in items]
    picks = [hull[0] for hull in hulls]
    cost = sum(options[pick].cost for options, pick in zip(items, picks, strict=True))
    error = sum(options[pick].error for options, pick in zip(items, picks, strict=True))
    slack = 1e-9 * max(budget, 1e-9)
    if cost > budget + slack:
        raise ValueError(f"budget: wanted at least {cost:.4g}, what the cheapest candidates cost, got {budget:.4g}")
    bound, open_bound = error, True
    blocked = [False] * len(items)
    for _, index, place in ascents(items, hulls):
        before, after = items[index][hulls[index][place - 1]], items[index][hulls[index][place]]
        more, saved = after.cost - before.cost, before.error - after.error
        fits = cost + more <= budget + slack
        if open_bound:
            bound -= saved if fits else saved * (budget - cost) / more
            open_bound = fits
        if blocked[index] or not fits:
            blocked[index] = True
            continue
        picks[index], cost, error = hulls[index][place], cost + more, error - saved
    _fill(items, picks, budget + slack)
    return Allocation(
        picks=tuple(picks),
        cost=sum(options[pick].cost for options, pick in zip(items, picks, strict=True)),
        error=sum(options[pick].error for options, pick in zip(items, picks, strict=True)),
        bound=max(bound, 0.0),
    )


def cheapest(items: Sequence[Sequence[Option]], max_error: float) -> Allocation:
    """Choose one option for each item so that the sum of costs is least within a sum of errors.

    Args:
        items: as in `allocate`.
        max_error: largest sum of errors.

    Returns:
        The allocation; its `bound` is a lower bound of the *error* at its cost.

    Raises:
        ValueError: not even the best options stay below.
    """
    turned = allocate([[Option(o.error, o.cost) for o in options] for options in items], max_error)
    found = allocate(items, turned.error)
    return found if found.error <= max_error else _as_turned(turned, found.bound)


def _as_turned(turned: Allocation, bound: float) -> Allocation:
    return Allocation(picks=turned.picks, cost=turned.error, error=turned.cost, bound=bound)


def hull_of(options: Sequence[Option]) -> list[int]:
    """Places of the options on the lower convex hull of error over cost, by rising cost and falling error.

    Args:
        options: of one item, at least one.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].error, i))
    hull: list[int] = []
    for i in order:
        if hull and options[i].error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _rate(options, hull[-2], i) >= _rate(options, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def _rate(options: Sequence[Option], a: int, b: int) -> float:
    """Error saved per cost between two options; the second one costs more."""
    return (options[a].error - options[b].error) / (options[b].cost - options[a].cost)


def ascents(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[tuple[float, int, int]]:
    """All steps along the hulls, best first.

    Args:
        items: the options of each item.
        hulls: of each item, by `hull_of`.

    Returns:
        (error saved per cost, negative; item; place on its hull after the step).
    """
    steps = [
        (-_rate(items[index], hull[place - 1], hull[place]), index, place)
        for index, hull in enumerate(hulls)
        for place in range(1, len(hull))
    ]
    return sorted(steps)


def _fill(items: Sequence[Sequence[Option]], picks: list[int], budget: float) -> None:
    """Swap one item at a time for the option that saves the most error and still fits."""
    while True:
        left = budget - sum(options[pick].cost for options, pick in zip(items, picks, strict=True))
        best: tuple[float, int, int] | None = None
        for index, (options, pick) in enumerate(zip(items, picks, strict=True)):
            now = options[pick]
            for place, option in enumerate(options):
                saved = now.error - option.error
                if saved > 0 and option.cost - now.cost <= left and (best is None or saved > best[0]):
                    best = saved, index, place
        if best is None:
            return
        picks[best[1]] = best[2]
