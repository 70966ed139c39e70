"""The rows of the table: patterns x compensations x density x dense steps, the most telling first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from visparse import SparsePlan
from visparse.compensation import Proxies, ReuseResidual, ReuseStatistics
from visparse.compensation.refresh import Overlap
from visparse.patterns import Pattern, Radial, TopK
from visparse.templates import PatternTemplate

_TELLING = (
    "neighborhood, dropped",
    "foveal, 1 refresh",
    "neighborhood + residual",
    "foveal",
    "top-k mass_variance + proxies",
    "neighborhood + residual, 1 refresh",
    "neighborhood + proxies + residual, 1 refresh",
    "decay, dropped",
    "decay + residual",
    "top-k mass, dropped",
    "top-k pooled + proxies",
    "foveal, spread, 1 refresh",
    "foveal, overlap 0.8",
    "foveal, 2 refreshes",
    "foveal, overlap 0.9",
    "foveal, 3 refreshes",
    "foveal, overlap 0.7",
    "foveal, overlap 0.8, at most 1",
    "neighborhood + proxies",
    "decay + proxies",
    "neighborhood + statistics",
    "decay + statistics",
    "radial, dropped",
)
_WITH_MORE_DENSE = 6  # of the rows above
_OVERLAPS = ({"below": 0.7}, {"below": 0.8}, {"below": 0.9}, {"below": 0.8, "most": 1})
STORAGES = ("fp8", "average", "average-fp8", "low-rank")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row.

    Args:
        name: says everything that is varied.
        target: block density that was wanted; None where there is no such wish.
        plan: what runs.
        settings: further arguments of `visparse.sparsify`.
        static: whether the pattern goes by position alone.
    """

    name: str
    target: float | None
    plan: SparsePlan
    settings: Mapping[str, int] = field(default_factory=dict)
    static: bool = False


@dataclass(frozen=True)
class StaticChoice:
    """The best static pattern of a family: with its own masks, and in whole tiles (for proxies)."""

    family: str
    target: float
    masks: Pattern
    tiles: Pattern


def plan_of(
    pattern: Pattern,
    dense_steps: int,
    proxies: Proxies | None = None,
    statistics: ReuseStatistics | None = None,
    residual: ReuseResidual | None = None,
) -> SparsePlan:
    """A plan with one pattern in every layer and head."""
    return SparsePlan(
        name="ablation",
        patterns={"pattern": PatternTemplate(pattern.to_dict())},
        default="pattern",
        dense_steps=dense_steps,
        proxies=proxies,
        statistics=statistics,
        residual=residual,
    )


def all_cases(static: list[StaticChoice], targets: Sequence[float], steps: int, dense_steps: int) -> list[Case]:
    """Every row that is no dense run, the most telling first; names are unique.

    Args:
        targets: block densities; some things are varied at the first only.
        static: the best static patterns of these densities.
        steps: of a run.
        dense_steps: at its start; some rows have one more, and say so.
    """
    middle = _spaced(1, steps, dense_steps)[0]
    by_target = [
        [
            *_selected(t, dense_steps, middle, t == targets[0]),
            *_refreshed(t, steps, dense_steps),
            *_static(static, t, dense_steps, middle),
        ]
        for t in targets
    ]
    rows = [*chain(*by_target), _published(dense_steps)]
    others = chain(*reversed(by_target))
    telling = [case for name in _TELLING for case in rows if case.name.split(" @ ")[0] == name]
    first = [case for case in telling if case.target == targets[0]][:_WITH_MORE_DENSE]
    return [
        *telling,
        *(case for case in others if case not in telling),
        *_fine(targets[0], dense_steps),
        *(_more_dense(case, dense_steps + 1) for case in first),
        *_storages(targets[0], dense_steps),
    ]


def _static(choices: list[StaticChoice], target: float, dense: int, middle: int) -> list[Case]:
    ramp = ReuseStatistics(ramp=0.04)
    full, again = ReuseResidual(storage="full"), ReuseResidual(storage="full", refresh=(middle,))
    rows = []
    for one in choices:
        if one.target != target:
            continue
        plans = {
            "dropped": plan_of(one.masks, dense),
            "statistics": plan_of(one.masks, dense, None, ramp),
            "residual": plan_of(one.masks, dense, None, None, full),
            "statistics + residual": plan_of(one.masks, dense, None, ramp, full),
            "residual, 1 refresh": plan_of(one.masks, dense, None, None, again),
            "proxies": plan_of(one.tiles, dense, Proxies()),
            "proxies + residual": plan_of(one.tiles, dense, Proxies(), None, full),
            "proxies + residual, 1 refresh": plan_of(one.tiles, dense, Proxies(), None, again),
        }
        rows += [
            Case(name=_name(one.family, what, target), target=target, plan=plan, static=True)
            for what, plan in plans.items()
        ]
    return rows


def _selected(target: float, dense: int, middle: int, spreads: bool) -> list[Case]:
    full, again = ReuseResidual(storage="full"), ReuseResidual(storage="full", refresh=(middle,))
    plans: dict[tuple[str, str], SparsePlan] = {}
    for score, spread in (("pooled", False), ("mass", False), ("mass_variance", False), ("mass_variance", True)):
        if spread and not spreads:
            continue
        top = TopK(share=target, score=score, spread=spread)
        name = f"top-k {score}{', spread' if spread else ''}"
        plans[name, "dropped"] = plan_of(top, dense)
        plans[name, "proxies"] = plan_of(top, dense, Proxies())
        if score != "mass_variance":
            continue
        renewed = TopK(share=target, score=score, spread=spread, refresh=(middle,))
        foveal = f"foveal{', spread' if spread else ''}"
        plans[name, "residual"] = plan_of(top, dense, None, None, full)
        plans[foveal, ""] = plan_of(top, dense, Proxies(), None, full)
        plans[foveal, "1 refresh"] = plan_of(renewed, dense, Proxies(), None, again)
        if not spread:
            plans[name, "residual, 1 refresh"] = plan_of(renewed, dense, None, None, again)
            plans[name, "4 proxies a tile"] = plan_of(top, dense, Proxies(per_tile=4))
            plans[foveal, "4 proxies a tile, 1 refresh"] = plan_of(renewed, dense, Proxies(per_tile=4), None, again)
            boxes = Proxies(tiles="boxes")  # all others by content are runs of a serpentine curve
            plans[name, "proxies, tiles as boxes"] = plan_of(top, dense, boxes)
            plans[foveal, "1 refresh, tiles as boxes"] = plan_of(renewed, dense, boxes, None, again)
    return [Case(name=_name(who, what, target), target=target, plan=plan) for (who, what), plan in plans.items()]


def _refreshed(target: float, steps: int, dense: int) -> list[Case]:
    """Foveal measured again at equal spacing, and where the overlap of its choices falls."""
    rules: dict[str, Overlap | tuple[int, ...]] = {f"{n} refreshes": _spaced(n, steps, dense) for n in (2, 3)}
    for entry in _OVERLAPS:
        rule = Overlap(**entry)
        rules[f"overlap {rule.below}{'' if rule.most is None else f', at most {rule.most}'}"] = rule
    return [
        Case(
            name=_name("foveal", what, target),
            target=target,
            plan=plan_of(
                TopK(share=target, score="mass_variance", refresh=rule),
                dense,
                Proxies(),
                None,
                ReuseResidual(storage="full", refresh=rule),
            ),
        )
        for what, rule in rules.items()
    ]


def _spaced(count: int, steps: int, dense: int) -> tuple[int, ...]:
    """Steps of so many measurements that cut the sparse steps into equal parts, as far as that goes."""
    return tuple(dense + (steps - dense) * at // (count + 1) for at in range(1, count + 1))


def _storages(target: float, dense: int) -> list[Case]:
    top = TopK(share=target, score="mass_variance")
    return [
        Case(
            name=_name("foveal", f"residual in {storage}", target),
            target=target,
            plan=plan_of(top, dense, Proxies(), None, ReuseResidual(storage=storage)),
        )
        for storage in STORAGES
    ]


def _fine(target: float, dense: int) -> list[Case]:
    """Smaller tiles than the kernels like."""
    top, full = TopK(share=target, score="mass_variance"), ReuseResidual(storage="full")
    plans = {
        "top-k mass_variance": plan_of(top, dense, Proxies()),
        "foveal": plan_of(top, dense, Proxies(), None, full),
    }
    return [
        Case(
            name=_name(who, f"{'proxies, ' if who != 'foveal' else ''}tiles of 64 x {block_k}", target),
            target=target,
            plan=plan,
            settings={"block_q": 64, "block_k": block_k},
        )
        for block_k in (64, 32)
        for who, plan in plans.items()
    ]


def _published(dense: int) -> Case:
    """Radial by its own rule, at the density that it has."""
    plan = plan_of(Radial(variant="code", decay=0.2), dense)
    return Case(name="radial, dropped", target=None, plan=plan, static=True)


def _more_dense(case: Case, dense: int) -> Case:
    fields = {**case.plan.to_dict(), "dense_steps": dense}
    plan = SparsePlan.from_dict(fields)
    return Case(name=f"{case.name}, {dense} dense steps", target=case.target, plan=plan, static=case.static)


def _name(who: str, what: str, target: float) -> str:
    joint = ", " if who.startswith("foveal") or what == "dropped" else " + "
    return f"{who}{joint if what else ''}{what} @ {target:.1%}"
