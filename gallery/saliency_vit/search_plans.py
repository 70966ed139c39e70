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
from visparse.head_search.candidates import PARTS
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.judge import OutputJudge
from visparse.head_search.probe import Line
from visparse.head_search.refine import Weights, variants_of
from visparse.head_search.searcher import Searcher
from visparse.head_search.sensitivity import find_weights
from visparse.head_search.settings import SearchSettings
from visparse.patterns import Neighborhood, Pattern, TopK

_FAMILY = "pooled"  # patterns with exact masks and nothing for the other keys are far off on this model
_WEIGHED_AT = 0.5  # share of attention's time at which the weights of layers are measured
_WEIGHED_ON = 2  # batches that say it: twelve plans run on each, and weights need not be exact
_VARIANTS = 3  # by weight, by its root, and all layers alike
_SHARES = (10, 15, 20, 29, 38, 42, 46, 58)  # per cent of the tiles, between the sizes of the library's candidates
_WINDOWS = {"near8": (1 / 8, 1 / 8), "near3": (1 / 3, 1 / 3), "tall": (1 / 2, 1 / 8), "columns8": (1, 1 / 8)}


def more_sizes(grid: tuple[int, int]) -> dict[str, Pattern]:
    """More candidates: tiles by pooled scores where the error falls steeply, and windows, which early layers need.

    Args:
        grid: (height, width) in tokens.
    """
    found: dict[str, Pattern] = {
        f"share{share}": TopK(share=share / 100, score="pooled", parts=PARTS) for share in _SHARES
    }
    for name, parts in _WINDOWS.items():
        high, wide = (max(1, round(length * part)) for length, part in zip(grid, parts, strict=True))
        found[name] = Neighborhood(window=(1, high, wide), stride=(1, min(8, high), min(8, wide)))
    return found


class Searched:
    """A scored search of the backbone, from which plans of any budget can be had.

    Attributes:
        searcher: the library's search.
        prices: of other plans on the same terms.
        table: of the scores, once there are any.
        weights: of the layers in the features; None: not measured.
    """

    table: Table

    def __init__(self, model: SaliencyViT, pictures: Sequence[Tensor], settings: dict[str, Any], weigh: int) -> None:
        """Look at the model; `score` does the rest.

        Args:
            model: dense.
            pictures: to calibrate on, batches [B, 3, side, side]; times are measured with the first one.
            settings: of `SearchSettings`, without a goal.
            weigh: groups of layers whose weights are measured; 0: none.
        """
        self.model, self.pictures, self._groups = model, list(pictures), weigh
        self._weighed_on = min(_WEIGHED_ON, len(self.pictures))
        grid = model.backbone.patch_embed.grid_size  # type: ignore[union-attr]
        asked = SearchSettings(
            attention=0.5, dense_steps=0, name="searched", family=_FAMILY, patterns=more_sizes(grid), **settings
        )
        runs = [[{"x": picture}] for picture in pictures]
        self.searcher = Searcher(model.backbone, asked, inputs=runs)
        self.ready = self.searcher.prepare()
        work, costs = self.searcher.work, self.ready.costs
        self.prices = Prices(
            self.ready.layout,
            self.searcher.model.head_dim,
            self.searcher.model.heads,
            costs.device,
            self.searcher.device,
            costs.dense,
            {family: Line(*parts) for family, parts in work.facts.get("probe", {}).items()},
            asked.per_tile,
        )
        self.judge = OutputJudge(model.backbone, self._features, len(self.pictures), work)
        self.weights: Weights | None = None

    def score(self) -> None:
        """Score all candidates, and weigh the layers; what the work file has is not done again."""
        self.searcher.score(self.ready)
        ready = self.ready
        self.table = Table(self.searcher.work.scores, ready.candidates, ready.costs, ready.schedules)
        if self._groups:
            self.weights = self._weights(self._groups)

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
        for variant in variants_of(list(self.ready.schedules), self.weights)[:_VARIANTS]:
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
        """The weights of the layers; None where a call costs more than the budget before its first block."""
        try:
            base = self._plan(self._allocate(_FAMILY, _WEIGHED_AT, None))
        except ValueError:
            return None
        few = OutputJudge(self.model.backbone, self._features, self._weighed_on, self.searcher.work)
        return find_weights(self.table, _FAMILY, _WEIGHED_AT, groups, base, None, few)

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
            proxies=self.ready.candidates.proxies,
        )

    def _features(self, run: int) -> Any:
        with torch.no_grad():
            return SimpleNamespace(images=self.model.features(self.pictures[run]))
