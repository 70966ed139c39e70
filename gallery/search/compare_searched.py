"""Searched plans: one scoring of all candidates, then a plan for any share of dense attention's time at once."""

import time
from dataclasses import dataclass
from typing import Any

from visparse import SparsePlan
from visparse.head_search.build import build_plan
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.searcher import Searcher
from visparse.head_search.settings import SearchSettings


@dataclass(frozen=True)
class Offer:
    """A plan, and its predicted share of dense attention's time, milliseconds and error at a sparse step."""

    plan: SparsePlan
    share: float
    milliseconds: float | None = None
    error: float | None = None


class Searched:
    """One search, done.

    Args:
        pipe: the pipeline, dense.
        settings: of the search; its goal does not matter.

    Attributes:
        seconds: what it took, by part.
    """

    def __init__(self, pipe: Any, settings: SearchSettings) -> None:
        begun = time.perf_counter()
        self.settings = settings
        searcher = Searcher(pipe, settings)
        self.ready = searcher.prepare()
        prepared = time.perf_counter()
        self.reasons = searcher.score(self.ready)
        self.model = searcher.model
        self.table = Table(searcher.work.scores, self.ready.candidates, self.ready.costs)
        self.seconds = {"prepare": prepared - begun, "score": time.perf_counter() - prepared}
        self.seconds["all"] = sum(self.seconds.values())

    def by_budget(self, family: str, share: float) -> Offer:
        """The search's own plan.

        Args:
            family: of its candidates.
            share: of dense attention's time that a sparse step may take.

        Raises:
            ValueError: the budget is too small.
        """
        return self._offer(f"searched, {family}", self.table.by_budget(family, self.model.layers, attention=share))

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
        )
        return Offer(plan, found.attention, found.milliseconds, found.error)
