"""The rows of the comparison, the most telling first."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from ablation_cases import plan_of
from ablation_clips import Size
from ablation_rows import Row
from compare_arena import Arena, Trial, rank
from compare_searched import WAYS, Offer
from compare_singles import UNIFORM, Ladder, all_kinds, uniform

from visparse.head_search.candidates import compensations
from visparse.head_search.refine import Variant
from visparse.patterns import Pattern

Job = tuple[str, Callable[[], Row]]
BEST = 2  # single patterns that are judged for each target


class Comparison:
    """Contenders and their rows.

    Args:
        arena: the size of clips.
        ladders: waits for the single patterns' costs, and returns them.
        targets: shares of dense attention's time in a sparse step.
        kinds: single patterns tried at all targets but the first: the best ones there.
        tries: trials of each contender, to bring its measured time near the target.
        in_time: whether single patterns may still be tried.
        refine: plans tried for the searched one of each target; the last number goes on.

    Attributes:
        notes: what was tried, for the settings of the record.
        plans: label -> plan of the judged rows.
    """

    def __init__(
        self,
        arena: Arena,
        ladders: Callable[[], list[Ladder]],
        targets: Sequence[float],
        *,
        kinds: int,
        tries: int,
        in_time: Callable[[], bool],
        refine: Sequence[int] = (3,),
    ) -> None:
        self.arena, self._ladders, self.targets = arena, ladders, list(targets)
        self.kinds, self.tries, self.in_time = kinds, tries, in_time
        self.refine = dict(zip(targets, [*refine, *refine[-1:] * len(targets)], strict=False))
        self.notes: dict[str, Any] = {"singles": [], "no_size": [], "not_tried": [], "tuned": {}}
        self.plans: dict[str, Any] = {}
        self._singles: dict[float, list[tuple[Ladder, Trial]]] = {}
        self._order: list[Ladder] = []
        self._elsewhere: dict[tuple[Size, str], Trial] = {}

    def jobs(self, fewer: Sequence[int], elsewhere: Sequence[Size] = ()) -> list[Job]:
        """All rows but the dense reference: name and function of each.

        The most telling come first, and last those whose layers mix kinds of patterns, which are compiled as they come.

        Args:
            fewer: steps of the dense runs with fewer steps.
            elsewhere: sizes at which the searched plans are used too.
        """
        runner = self.arena.runner
        jobs: list[Job] = []
        for target in self.targets:
            jobs.append(self._job("searched, foveal", target, self.searched, "foveal"))
            jobs.append(self._job("uniform foveal", target, self.uniform))
        jobs.append(("floor", self._entered(runner.floor)))
        jobs += [(f"dense, {n} steps", self._entered(partial(runner.fewer, n))) for n in fewer]
        for target in self.targets:
            jobs += [self._job(f"single pattern {n + 1}", target, self.single, n) for n in range(BEST)]
        for target in self.targets:
            jobs += [self._job(f"compensated pattern {n + 1}", target, self.compensated, n) for n in range(BEST)]
        jobs += [self._job("sparse-vdit, epsilon by cost", target, self.published) for target in self.targets]
        jobs.append(("sparse-vdit as published", self.as_published))
        jobs += [self._job("searched, plain", target, self.searched, "plain") for target in self.targets]
        for size in elsewhere:
            there = self._there(size)
            for family in ("foveal", "plain"):
                name = f"{family}, {size.num_frames} x {size.height} x {size.width}"
                jobs.append((f"transferred, {name}", partial(self.transferred, there, family)))
                jobs.append((f"searched there, {name}", partial(self.at_home, there, family)))
        return jobs

    # ---- rows --------------------------------------------------------------------------------------------------------

    def searched(self, target: float, family: str) -> Row:
        """The search's own plan: the way to weigh errors that is best on the clips of trials, or what a climb finds."""
        one = self.arena.searched
        trials: list[tuple[Variant, Trial]] = []
        aim: float | None = None
        for variant in one.variants(family):
            trial = self._tune(variant.name, target, partial(one.by_budget, family, variant=variant), aim)
            trials.append((variant, trial))
            aim = trial.offer.share
        variant, trial = min(trials, key=lambda one: rank(one[1], target))
        name = f"{family} @ {target:.1%}"
        climbs = family == "foveal"
        better = one.climbed(variant, trial.offer.share, name, self.refine[target] - WAYS) if climbs else None
        if better is not None:  # on all calibration clips, which the trial does not see
            offers = partial(one.by_budget, family, variant=better)
            again = self._tune(better.name, target, offers, trial.offer.share)
            late, _ = rank(again, target)
            trial = trial if late else again
        return self._row(f"searched, {name}", trial, target, "searched", family)

    def uniform(self, target: float) -> Row:
        """Foveal with the same share of tiles for every head."""
        refresh = self.arena.searched.settings.refresh
        ladder = self._ladder(UNIFORM, uniform(refresh), "foveal")
        trial = self._tune("uniform foveal", target, partial(self._offer, ladder))
        return self._row(f"uniform foveal @ {target:.1%}", trial, target, "compensated", UNIFORM)

    def single(self, target: float, place: int) -> Row:
        """The best single patterns, nothing in the place of what is not seen."""
        found = self._best(target)
        if place >= len(found):
            raise ValueError(
                f"single patterns: wanted {place + 1} that cost {target:.1%} of dense attention or less, found "
                f"{len(found)}; ask for more, or give more seconds"
            )
        ladder, trial = found[place]
        return self._row(f"{ladder.kind} @ {target:.1%}", trial, target, "single", ladder.kind)

    def compensated(self, target: float, place: int) -> Row:
        """The best single patterns in whole tiles, with proxies and residual."""
        tiled = [self._ladder(one.kind, one.rungs, "foveal") for one, _ in self._best(target)]
        share = self.arena.searched.raw_share("foveal", target)
        tiled = [one for one in tiled if one.below(share) is not None]
        if place >= len(tiled):
            raise ValueError(f"compensated patterns: {len(tiled)} of the best single ones can be had at {target:.1%}")
        ladder = tiled[place]
        trial = self._tune(f"compensated {ladder.kind}", target, partial(self._offer, ladder))
        return self._row(
            f"{ladder.kind} + proxies + residual @ {target:.1%}", trial, target, "compensated", ladder.kind
        )

    def published(self, target: float) -> Row:
        """Sparse-vDiT's rule at the cost that is wanted."""
        trial = self._tune("sparse-vdit", target, self.arena.searched.by_paper)
        return self._row(f"{trial.offer.plan.name} @ {target:.1%}", trial, target, "published", "sparse-vdit")

    def as_published(self) -> Row:
        """Sparse-vDiT's rule with its own epsilon."""
        trial = self.arena.trial(self.arena.searched.as_published())
        return self._row(trial.offer.plan.name, trial, None, "published", "sparse-vdit")

    def transferred(self, there: Arena, family: str) -> Row:
        """The plan of this size, for the last target, at another one."""
        trial = self._moved(there, family)
        return self._there_row(there, f"transferred, {family}", trial, "transferred")

    def at_home(self, there: Arena, family: str) -> Row:
        """A plan that was searched at the other size, for what the transferred one takes there.

        Without a probe: for the same share of dense attention by rates.
        """
        moved = self._moved(there, family).share
        share = moved if self.arena.options.get("probe", True) else self.targets[-1]
        trial = there.tuned(partial(there.searched.by_budget, family), share, self.tries)[0]
        return self._there_row(there, f"searched there, {family}", trial, "searched there")

    # ---- parts -------------------------------------------------------------------------------------------------------

    @cached_property
    def ladders(self) -> list[Ladder]:
        """The single patterns."""
        return self._ladders()

    def _best(self, target: float) -> list[tuple[Ladder, Trial]]:
        """The best single patterns by the calibration clip, in time where they can be."""
        if target not in self._singles:
            first = target == self.targets[0]
            found = self._screen(target, self.ladders if first else self._likely())
            if first:
                self._order = [ladder for ladder, _ in found]
            tuned = []
            for ladder, trial in found[: 2 * BEST]:
                near = abs(trial.share / target - 1) <= 0.03
                trials = [trial] if near or self.tries < 2 else self._again(ladder, trial, target)
                tuned.append((ladder, min([trial, *trials], key=lambda one: rank(one, target))))
            self._singles[target] = sorted(tuned, key=lambda one: rank(one[1], target))
        return self._singles[target]

    def _likely(self) -> list[Ladder]:
        """The kinds that were best at the first target."""
        self._best(self.targets[0])
        return self._order[: self.kinds]

    def _again(self, ladder: Ladder, trial: Trial, target: float) -> list[Trial]:
        """One more trial of a pattern whose time was off."""
        found = ladder.known_below(self.arena.searched.raw_share(ladder.family, target * target / trial.share))
        offer = None if found is None else self._single_offer(ladder, *found)
        return [] if offer is None or offer.plan == trial.offer.plan else [self.arena.trial(offer)]

    def _screen(self, target: float, ladders: Sequence[Ladder]) -> list[tuple[Ladder, Trial]]:
        found: list[tuple[Ladder, Trial]] = []
        for ladder in ladders:
            where = {"kind": ladder.kind, "target": target}
            if not self.in_time():
                self.notes["not_tried"].append(where)
                continue
            try:
                offer = self._offer(ladder, target)
            except ValueError:
                self.notes["no_size"].append(where)
                continue
            print(f"trying {ladder.kind} @ {target:.1%}", flush=True)  # where a kernel is compiled for long, it shows
            trial = self.arena.trial(offer)
            pattern = offer.plan.patterns["pattern"].to_dict()
            self.notes["singles"].append(where | {"pattern": pattern} | trial.to_dict())
            found.append((ladder, trial))
        return sorted(found, key=lambda one: -one[1].psnr)

    def _offer(self, ladder: Ladder, share: float) -> Offer:
        found = ladder.below(self.arena.searched.raw_share(ladder.family, share))
        if found is None:
            raise ValueError(f"{ladder.kind}: no size costs {share:.1%} of dense attention or less; ask for more")
        return self._single_offer(ladder, *found)

    def _single_offer(self, ladder: Ladder, pattern: Pattern, cost: float) -> Offer:
        arena = self.arena
        refresh = arena.searched.settings.refresh
        proxies, residual = compensations(ladder.family, refresh)
        plan = plan_of(pattern, arena.dense_steps, proxies, None, residual)
        return Offer(plan, *arena.searched.predicted(ladder.family, cost))

    def _ladder(self, kind: str, rungs: Sequence[Pattern], family: str) -> Ladder:
        one = self.arena.searched
        where = self.arena.studio.device
        return Ladder(
            kind, rungs, family, self.arena.size.grid, one.model.head_dim, one.ready.costs.device, counted_on=where
        )

    def _tune(self, name: str, target: float, offers: Callable[[float], Offer], aim: float | None = None) -> Trial:
        trials = self.arena.tuned(offers, target, self.tries, aim)
        self.notes["tuned"][f"{name} @ {target:.1%}"] = [one.to_dict() for one in trials]
        return trials[0]

    def _row(self, label: str, trial: Trial, target: float | None, kind: str, what: str) -> Row:
        self.plans[label] = trial.offer.plan
        return self.arena.row(label, trial, target, kind=kind, what=what)

    def _job(self, name: str, target: float, make: Callable[..., Row], *more: Any) -> Job:
        return f"{name} @ {target:.1%}", partial(make, target, *more)

    def _entered(self, make: Callable[[], Row]) -> Callable[[], Row]:
        def run() -> Row:
            self.arena.enter()
            return make()

        return run

    def _there(self, size: Size) -> Arena:
        arena = self.arena
        return Arena(
            arena.studio,
            size,
            arena.wanted[:1],
            steps=arena.steps,
            dense_steps=arena.dense_steps,
            search=arena.options,
            calibration=len(arena.wishes),
            deadline=arena.deadline,
        )

    def _moved(self, there: Arena, family: str) -> Trial:
        """The trial, at another size, of the plan that was searched at this one."""
        key = (there.size, family)
        if key not in self._elsewhere:
            target = self.targets[-1]
            plan = self.plans.get(f"searched, {family} @ {target:.1%}")
            if plan is None:
                raise ValueError(f"transfer: the plan searched for {target} is missing; see its own failure")
            self._elsewhere[key] = there.trial(Offer(plan, target))
        return self._elsewhere[key]

    def _there_row(self, there: Arena, label: str, trial: Trial, kind: str) -> Row:
        if there.runner.reference is None:
            there.dense()
        size = there.size
        label = f"{label} @ {self.targets[-1]:.1%}, {size.num_frames} x {size.height} x {size.width}"
        return there.row(label, trial, self.targets[-1], kind=kind, what=label) | {"plan": "elsewhere"}


def plain_ladders(size: Size, head_dim: int, device: str, counted_on: torch.device | None = None) -> list[Ladder]:
    """The single patterns of the library without compensation."""
    return [
        Ladder(kind, rungs, "plain", size.grid, head_dim, device, counted_on=counted_on)
        for kind, rungs in all_kinds(size.grid).items()
    ]
