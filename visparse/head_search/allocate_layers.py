"""Allocate layers: heads one by one, or all heads of a layer dense, which costs less than its heads say together.

A layer whose heads are all dense is served by dense attention; one dense head beside sparse ones is served by block
lists, which take longer. So "all dense" is a choice of its own, and heads alone cannot make it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visparse.head_search.allocate import Allocation, Option, allocate, ascents, cheapest, hull_of

_SLACK = 2e-9  # of the goal: sums in another order


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer in a range of steps.

    Attributes:
        heads: the options of each head.
        call: what a sparse call costs besides its heads.
        place: of the option that is dense, in every head; None: none is.
        dense: cost and error where all heads have it; None with `place`.
    """

    heads: Sequence[Sequence[Option]]
    call: float = 0.0
    place: int | None = None
    dense: Option | None = None


def allocate_layers(layers: Sequence[Layer], budget: float) -> Allocation:
    """Choose one option for each head, so that the sum of errors is least within a budget.

    First each layer is one item: the best that its heads can do at each cost, or all of them dense. Then the heads of
    the layers that are not dense are allocated one by one with what is left; a layer whose heads would cost as much as
    dense attention becomes dense, and what that frees is spent again.

    Args:
        layers: with at least one option for each head.
        budget: of cost.

    Returns:
        The allocation; its picks are those of all heads, layer by layer.

    Raises:
        ValueError: as `allocate`.
    """
    frontiers = [_frontier(layer) for layer in layers]
    coarse = allocate(frontiers, budget)

    def solve(items: Sequence[Sequence[Option]], cost: float, error: float) -> Allocation:
        return allocate(items, budget * (1 + _SLACK) - cost)

    found = [_settled(layers, whole, solve, coarse.bound) for whole in (_whole(layers, frontiers, coarse), frozenset())]
    return min((one for one in found if one is not None), key=lambda one: (one.error, one.cost))


def cheapest_layers(layers: Sequence[Layer], max_error: float) -> Allocation:
    """Choose one option for each head, so that the sum of costs is least within a sum of errors.

    Args:
        layers: as in `allocate_layers`.
        max_error: largest sum of errors.

    Raises:
        ValueError: not even the best options stay below.
    """
    frontiers = [_frontier(layer) for layer in layers]
    coarse = cheapest(frontiers, max_error)

    def solve(items: Sequence[Sequence[Option]], cost: float, error: float) -> Allocation:
        return cheapest(items, max_error * (1 + _SLACK) - error)

    found = [_settled(layers, whole, solve, coarse.bound) for whole in (_whole(layers, frontiers, coarse), frozenset())]
    return min((one for one in found if one is not None), key=lambda one: (one.cost, one.error))


def _frontier(layer: Layer) -> list[Option]:
    """What a layer can be at rising costs, and last, all of it dense."""
    hulls = [hull_of(options) for options in layer.heads]
    now = [options[hull[0]] for options, hull in zip(layer.heads, hulls, strict=True)]
    found = [_sum(now, layer.call)]
    for _, head, place in ascents(layer.heads, hulls):
        now[head] = layer.heads[head][hulls[head][place]]
        found.append(_sum(now, layer.call))
    return found if layer.dense is None else [*found, layer.dense]


def _sum(options: Sequence[Option], call: float) -> Option:
    return Option(call + sum(one.cost for one in options), sum(one.error for one in options))


def _whole(layers: Sequence[Layer], frontiers: Sequence[Sequence[Option]], coarse: Allocation) -> frozenset[int]:
    """The layers that are dense, of a choice among their frontiers."""
    return frozenset(
        index
        for index, (layer, frontier, pick) in enumerate(zip(layers, frontiers, coarse.picks, strict=True))
        if layer.dense is not None and pick == len(frontier) - 1
    )


def _settled(
    layers: Sequence[Layer],
    whole: frozenset[int],
    solve: Callable[[Sequence[Sequence[Option]], float, float], Allocation],
    bound: float,
) -> Allocation | None:
    """Allocate the heads of all layers but the dense ones, until none of those costs as much as dense; None: cannot be.

    Args:
        layers: all of them.
        whole: those that are dense.
        solve: function (options of heads, cost and error of all else) -> their allocation.
        bound: of the error.
    """
    while True:
        rest = [index for index in range(len(layers)) if index not in whole]
        dense = [one for index in sorted(whole) if (one := layers[index].dense) is not None]
        cost, error = sum(one.cost for one in dense), sum(one.error for one in dense)
        cost += sum(layers[index].call for index in rest)
        picks: dict[int, Sequence[int]] = {}
        if rest:
            try:
                found = solve([options for index in rest for options in layers[index].heads], cost, error)
            except ValueError:
                return None
            at = 0
            for index in rest:
                picks[index] = found.picks[at : at + len(layers[index].heads)]
                at += len(picks[index])
        dear = {index for index in rest if _as_dear(layers[index], picks[index])}
        if not dear:
            for index, layer in enumerate(layers):
                if index in whole and layer.place is not None:
                    picks[index] = [layer.place] * len(layer.heads)
            sums = [_picked(layer, picks[index], index in whole) for index, layer in enumerate(layers)]
            return Allocation(
                picks=tuple(pick for index in range(len(layers)) for pick in picks[index]),
                cost=sum(one.cost for one in sums),
                error=sum(one.error for one in sums),
                bound=bound,
            )
        whole |= dear


def _picked(layer: Layer, picks: Sequence[int], whole: bool) -> Option:
    if whole and layer.dense is not None:
        return layer.dense
    return _sum([options[pick] for options, pick in zip(layer.heads, picks, strict=True)], layer.call)


def _as_dear(layer: Layer, picks: Sequence[int]) -> bool:
    """Whether dense attention of the whole layer costs no more, and errs no more."""
    own = _picked(layer, picks, False)
    return layer.dense is not None and own.cost >= layer.dense.cost and own.error >= layer.dense.error
