"""Searched plans: one scoring of all candidates, then a plan for any share of dense attention's time at once."""

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from visparse import SparsePlan
from visparse.head_search.build import build_plan
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.climb import GROUPS, climb_from
from visparse.head_search.costs import make_costs
from visparse.head_search.judge import OutputJudge
from visparse.head_search.probe import Line
from visparse.head_search.refine import Variant, Weights, variants_of
from visparse.head_search.searcher import Searcher
from visparse.head_search.sensitivity import find_weights
from visparse.head_search.settings import SearchSettings

WAYS = 3  # to weigh errors, of one family; what is left of `refine` climbs


@dataclass(frozen=True)
class Offer:
    """A plan, and its predicted share of dense attention's time, milliseconds and error at a sparse step."""

    plan: SparsePlan
    share: float
    milliseconds: float | None = None
    error: float | None = None


class Searched:
    """One search: what it measures is measured when it is first asked for.

    Args:
        pipe: the pipeline, dense.
        settings: of the search; its goal does not matter.
        deadline: on `time.perf_counter`; no plan is judged after it. None: none.

    Attributes:
        seconds: what it took, by part.
        climbs: what was tried in each climb.
    """

    def __init__(self, pipe: Any, settings: SearchSettings, deadline: float | None = None) -> None:
        begun = time.perf_counter()
        self.settings = settings
        self._searcher = searcher = Searcher(pipe, settings)
        self.ready = searcher.prepare()
        self.model = searcher.model
        self.seconds = {"prepare": time.perf_counter() - begun}
        self.reasons: dict[int, str] = {}
        self.climbs: dict[str, list[dict[str, Any]]] = {}
        self.lines = {family: Line(*parts) for family, parts in searcher.work.facts.get("probe", {}).items()}
        own = make_costs([], self.ready.layout, self.model.head_dim, self.ready.costs.device)
        self._raw_dense = own.dense * self.model.heads  # a layer, by rates alone
        self._dense = self.ready.costs.dense * self.model.heads  # as measured
        generate = partial(searcher.generate, decode=True)
        self._judge = OutputJudge(pipe, generate, searcher.runs, searcher.work, deadline=deadline)

    @cached_property
    def table(self) -> Table:
        """The scores."""
        begun = time.perf_counter()
        self.reasons = self._searcher.score(self.ready)
        self.seconds["score"] = time.perf_counter() - begun
        return Table(self._searcher.work.scores, self.ready.candidates, self.ready.costs, self.ready.schedules)

    @cached_property
    def weights(self) -> Weights | None:
        """Weights of layers in the model's output; None: not measured."""
        settings = self.settings
        if not settings.weigh:
            return None
        base = self.by_budget("foveal", 0.25).plan
        begun = time.perf_counter()
        found = find_weights(self.table, "foveal", 0.125, settings.weigh, base, settings.refresh, self._judge)
        self.seconds["weigh"] = time.perf_counter() - begun
        return found

    def known_weights(self) -> dict[str, Any]:
        """The weights for the settings of a record, if they were asked for."""
        weights = vars(self).get("weights")
        if weights is None:
            return {"weights": None}
        return {"weights": [[layer, at, float(f"{weight:.4g}")] for (at, layer), weight in sorted(weights.items())]}

    def raw_share(self, family: str, share: float) -> float:
        """What the rates alone must say for a plan to take a share of dense attention's measured time.

        Raises:
            ValueError: a call takes more before its first block.
        """
        line = self.lines.get(family, Line(0.0, 1.0))
        raw = (share * self._dense - line.call) / line.factor / self._raw_dense
        if raw <= 0:
            raise ValueError(
                f"{family} family: a call takes {line.call / self._dense:.1%} of dense attention before its first "
                f"block, wanted {share:.1%}; ask for more"
            )
        return raw

    def predicted(self, family: str, raw: float) -> tuple[float, float]:
        """Share of dense attention's time, and milliseconds of a sparse step, of what the rates alone call `raw`."""
        line = self.lines.get(family, Line(0.0, 1.0))
        layer = line.call + line.factor * raw * self._raw_dense
        return layer / self._dense, layer * self.model.layers

    def variants(self, family: str) -> list[Variant]:
        """The ways to allocate that a search tries, of one family."""
        found = [one for one in variants_of(list(self.ready.schedules), self.weights) if one.family == family]
        return [one for one in found if one.only is None][: min(self.settings.refine, WAYS)]

    def climbed(self, variant: Variant, share: float, name: str, tries: int) -> Variant | None:
        """A way with other weights that is better on all calibration clips; None where there is none.

        Args:
            variant: to begin with.
            share: of dense attention's time that a sparse step may take.
            name: of the climb, in `climbs`.
            tries: plans that are judged.
        """
        if tries < 1:
            return None
        begun = time.perf_counter()
        better, found = climb_from(
            variant,
            self.table,
            lambda own: self._chosen(own.family, share, own),
            lambda chosen: self._offer("climb", chosen).plan,
            self._judge,
            groups=self.settings.weigh or GROUPS,
            tries=tries,
            measured=self.weights,
        )
        self.climbs[name] = list(found.tried)
        self.seconds["climb"] = self.seconds.get("climb", 0.0) + time.perf_counter() - begun
        if not any(one["kept"] for one in found.tried):
            return None
        return replace(better, name=f"{variant.name}, climbed")

    def by_budget(self, family: str, share: float, variant: Variant | None = None) -> Offer:
        """The search's own plan.

        Args:
            family: of its candidates.
            share: of dense attention's time that a sparse step may take.
            variant: how errors count; None: all alike.

        Raises:
            ValueError: the budget is too small.
        """
        found = self._chosen(family, share, variant)
        return self._offer(f"searched, {family if variant is None else variant.name}", found)

    def by_paper(self, share: float) -> Offer:
        """Sparse-vDiT's rule, its epsilon set so that the cost comes nearest to a share from below.

        Where even the largest epsilon (no dense head) costs more, its plan is the cheapest there is.
        """
        low, high = 0.0, 16.0
        best = self.table.by_paper(self.model.layers, limit=high)
        for _ in range(30):
            middle = (low + high) / 2
            found = self.table.by_paper(self.model.layers, limit=middle)
            if found.attention <= share:
                high, best = middle, found
            else:
                low = middle
        return self._offer(f"sparse-vdit, epsilon {high:.4g}", best)

    def as_published(self) -> Offer:
        """Sparse-vDiT's rule with its own epsilon of 1."""
        return self._offer("sparse-vdit, epsilon 1", self.table.by_paper(self.model.layers, limit=1.0))

    def _chosen(self, family: str, share: float, variant: Variant | None) -> Chosen:
        weights = None if variant is None else variant.weights(sorted(self.table.error))
        return self.table.by_budget(family, self.model.layers, attention=share, weights=weights)

    def _offer(self, name: str, found: Chosen) -> Offer:
        settings = self.settings
        plan = build_plan(
            name,
            found.picks,
            family=found.family,
            model=self.model,
            grid=self.ready.layout.grid,
            dense_steps=settings.dense_steps,
            refresh=settings.refresh,
            notes="; ".join(["found by gallery/search/compare.py", *sorted(set(self.reasons.values()))]),
            measured={
                "predicted": {
                    "attention": round(found.attention, 6),
                    "attention_milliseconds": round(found.milliseconds, 6),
                    "block_density": round(found.block_density, 6),
                    "error": round(found.error, 6),
                    "gap": None if found.gap is None else round(found.gap, 6),
                },
                "layers": {str(layer): [round(error, 5), round(ms, 5)] for layer, (error, ms) in found.layers.items()},
                "rates": self.ready.costs.source,
            },
            starts=self.ready.schedules[found.family].starts,
            proxies=self.ready.candidates.proxies,
        )
        return Offer(plan, found.attention, found.milliseconds, found.error)
