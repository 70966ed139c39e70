"""The searched plan: scores of the library's search, several allocations, and the best of them by the features."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from search_prices import Prices
from torch import Tensor
from vit import SaliencyViT

from visparse import SparsePlan
from visparse.head_search.build import build_plan
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.judge import OutputJudge
from visparse.head_search.probe import Line
from visparse.head_search.refine import Weights, variants_of
from visparse.head_search.searcher import Searcher
from visparse.head_search.sensitivity import find_weights
from visparse.head_search.settings import SearchSettings

_WEIGHED_AT = 0.5  # share of attention's time at which the weights of layers are measured


class Searched:
    """A scored search of the backbone, from which plans of any budget can be had.

    Attributes:
        searcher: the library's search.
        prices: of other plans on the same terms.
        weights: of the layers in the features; None: not measured.
    """

    def __init__(self, model: SaliencyViT, pictures: Sequence[Tensor], settings: dict[str, Any], weigh: int) -> None:
        """Score, on calibration pictures.

        Args:
            model: dense.
            pictures: batches [B, 3, side, side]; times are measured with the first one.
            settings: of `SearchSettings`, without a goal.
            weigh: groups of layers whose weights are measured; 0: none.
        """
        self.model, self.pictures = model, list(pictures)
        asked = SearchSettings(attention=0.5, dense_steps=0, name="searched", **settings)
        runs = [[{"x": picture}] for picture in pictures]
        self.searcher = Searcher(model.backbone, asked, inputs=runs)
        self.ready = self.searcher.prepare()
        self.reasons = self.searcher.score(self.ready)
        work, costs = self.searcher.work, self.ready.costs
        self.table = Table(work.scores, self.ready.candidates, costs, self.ready.schedules)
        self.prices = Prices(
            self.ready.layout,
            self.searcher.model.head_dim,
            self.searcher.model.heads,
            costs.device,
            self.searcher.device,
            costs.dense,
            {family: Line(*parts) for family, parts in work.facts.get("probe", {}).items()},
        )
        self.judge = OutputJudge(model.backbone, self._features, len(self.pictures), work)
        self.weights: Weights | None = None
        if weigh:
            self.weights = self._weights(weigh)

    def best(self, share: float) -> tuple[SparsePlan, dict[str, Any]]:
        """The best plan of a budget by the features of the calibration pictures.

        Args:
            share: of dense attention's time.

        Returns:
            The plan; its predicted share of time, its family, and the error of every allocation that was tried.

        Raises:
            ValueError: no family has a plan within it.
        """
        errors: dict[str, float] = {}
        made: dict[str, tuple[Chosen, SparsePlan]] = {}
        refused: list[ValueError] = []
        for variant in variants_of(list(self.ready.schedules), self.weights):
            weights = variant.weights(sorted(self.table.error))
            try:
                chosen = self._allocate(variant.family, share, weights, variant.only)
            except ValueError as error:
                refused.append(error)
                continue
            made[variant.name] = chosen, self._plan(chosen)
            errors[variant.name] = self.judge.error(made[variant.name][1], variant.name) or 0.0
        if not made:
            raise refused[0]
        taken = min(errors, key=lambda name: errors[name])
        chosen, plan = made[taken]
        facts = {
            "predicted_share": round(chosen.attention, 4),
            "family": chosen.family,
            "taken": taken,
            "tried": {name: round(error, 5) for name, error in errors.items()},
        }
        return plan, facts

    def _weights(self, groups: int) -> Weights | None:
        """The weights of the layers, by plans of the first family that can be had; None where none can."""
        for family in ("pooled", "plain"):
            try:
                base = self._plan(self._allocate(family, _WEIGHED_AT, None))
            except ValueError:  # a call costs more than that before its first block
                continue
            return find_weights(self.table, family, _WEIGHED_AT, groups, base, self.judge)
        return None

    def _allocate(self, family: str, share: float, weights: Weights | None, only: Any = None) -> Chosen:
        layers = self.searcher.model.layers
        return self.table.by_budget(family, layers, attention=share, weights=weights, only=only)

    def _plan(self, chosen: Chosen) -> SparsePlan:
        return build_plan(
            "searched",
            chosen.picks,
            family=chosen.family,
            model=self.searcher.model,
            grid=self.ready.layout.grid,
            dense_steps=0,
            refresh=None,
            notes="",
            measured={},
        )

    def _features(self, run: int) -> Any:
        with torch.no_grad():
            return SimpleNamespace(images=self.model.features(self.pictures[run]))
