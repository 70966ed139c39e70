"""The searched plan: scores of the library's search, several allocations, and the best of them by features or maps."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from search_clock import whole_seconds
from search_prices import Prices
from torch import Tensor
from vit import SaliencyViT

from visparse import SparsePlan
from visparse.head_search.build import build_plan
from visparse.head_search.candidates import PARTS
from visparse.head_search.choose import Chosen, Part, Table
from visparse.head_search.climb import Climbed, climb_from
from visparse.head_search.judge import OutputJudge
from visparse.head_search.probe import Line
from visparse.head_search.refine import Variant, Weights, judge_all, variants_of
from visparse.head_search.searcher import Searcher
from visparse.head_search.sensitivity import find_weights
from visparse.head_search.settings import SearchSettings
from visparse.head_search.work import WorkFile
from visparse.patterns import Neighborhood, Pattern, TopK

_FAMILY = "pooled"  # patterns with exact masks and nothing for the other keys are far off on this model
_WEIGHED_AT = 0.5  # share of attention's time at which the weights of layers are measured
JUDGES = ("features", "maps")
_VARIANTS = 4  # by weight, by its root, all layers alike, and that with tiles by content only
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
    """

    table: Table

    def __init__(
        self,
        model: SaliencyViT,
        pictures: Sequence[Tensor],
        settings: dict[str, Any],
        weigh: int,
        judged: str = "features",
        climb: int = 0,
        timed: Tensor | None = None,
        graph: bool = False,
    ) -> None:
        """Look at the model; `score` does the rest.

        Args:
            model: dense.
            pictures: to calibrate on, batches [B, 3, side, side].
            settings: of `SearchSettings`, without a goal.
            weigh: groups of layers whose weights are measured; 0: none.
            judged: one of `JUDGES`: the root mean square error of the features, or of maps brought to mean 0 and
                deviation 1, whose square is twice what their correlation lacks of 1.
            climb: plans of a climb from the best way to weigh errors; 0: none.
            timed: batch that times are measured with; None: the first of `pictures`.
            graph: two plans of each family are timed as CUDA graphs, so that plans are searched for such calls.
        """
        self.model, self.pictures, self._groups, self._tries = model, list(pictures), weigh, climb
        grid = model.backbone.patch_embed.grid_size  # type: ignore[union-attr]
        asked = SearchSettings(
            attention=0.5, dense_steps=0, name="searched", family=_FAMILY, patterns=more_sizes(grid), **settings
        )
        runs = [[{"x": picture}] for picture in pictures]
        clocked = pictures[0] if timed is None else timed
        self.searcher = Searcher(
            model.backbone,
            asked,
            inputs=runs,
            timed=None if timed is None else [{"x": timed}],
            timer=(lambda: whole_seconds(model, clocked, graph=True)) if graph else None,
        )
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
            asked.blocks,
        )
        output = {"features": self._features, "maps": self._maps}[judged]
        own = asked.work and asked.work.with_suffix(f".{judged}{asked.work.suffix}")
        self.judge = OutputJudge(model.backbone, output, len(self.pictures), WorkFile(own, {"judged": judged}))

    def score(self) -> None:
        """Score all candidates; what the work file has is not done again."""
        self.searcher.score(self.ready)
        ready = self.ready
        self.table = Table(self.searcher.work.scores, ready.candidates, ready.costs, ready.schedules)

    def best(self, share: float) -> tuple[SparsePlan, dict[str, Any]]:
        """The best plan of a budget by what the model makes of the calibration pictures.

        Args:
            share: of dense attention's time.

        Returns:
            The plan; its predicted share of time, its family, the error of every allocation that was tried, and what
            a climb found.

        Raises:
            ValueError: no family has a plan within it.
        """
        measured = self._weights() if self._groups else None
        made: dict[str, tuple[Chosen, SparsePlan]] = {}
        ways: dict[str, Variant] = {}
        refused: list[ValueError] = []
        for variant in variants_of(list(self.ready.schedules), measured)[:_VARIANTS]:
            try:
                chosen = self._allocate(variant.family, share, variant.weights(self._parts), variant.only)
            except ValueError as error:
                refused.append(error)
                continue
            made[variant.name], ways[variant.name] = (chosen, self._plan(chosen)), variant
        if not made:
            raise refused[0]
        found = judge_all(made, self.judge)
        chosen, plan, facts = found.chosen, found.plan, {}
        if self._tries:
            climbed = self._climbed(share, ways[found.taken], measured)
            chosen, plan, facts = climbed.chosen, climbed.plan, {"climbed": round(climbed.error, 4)}
            facts["climb"] = list(climbed.tried)
        return plan, {
            "predicted_share": round(chosen.attention, 4),
            "family": chosen.family,
            "taken": found.taken,
            "tried": {name: round(error, 5) for name, error in found.errors.items()},
            **facts,
        }

    @property
    def _parts(self) -> list[Part]:
        return sorted(self.table.error)

    def _weights(self) -> Weights | None:
        """The weights of the layers; None where a call costs more than the budget before its first block."""
        try:
            base = self._plan(self._allocate(_FAMILY, _WEIGHED_AT, None))
        except ValueError:
            return None
        return find_weights(self.table, _FAMILY, _WEIGHED_AT, self._groups, base, None, self.judge)

    def _climbed(self, share: float, way: Variant, measured: Weights | None) -> Climbed:
        """Other weights than those of a way, a group of layers at a time."""
        _, found = climb_from(
            way,
            self.table,
            lambda own: self._allocate(own.family, share, own.weights(self._parts), own.only),
            self._plan,
            self.judge,
            groups=self._groups or len(self.table.layers),
            tries=self._tries,
            measured=measured,
        )
        return found

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

    def _maps(self, run: int) -> Any:
        maps = self.model.saliency(self.model.features(self.pictures[run])).flatten(1)
        deviation, mean = torch.std_mean(maps, dim=1, keepdim=True, correction=0)
        return SimpleNamespace(images=(maps - mean) / deviation)

    def _features(self, run: int) -> Any:
        with torch.no_grad():
            return SimpleNamespace(images=self.model.features(self.pictures[run]))
