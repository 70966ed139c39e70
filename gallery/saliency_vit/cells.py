"""Cells of the study: which tiles are seen, and what stands in for the others, in one layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from kept import by_score, residual_scores, shipped_scores, window
from layer import Layer, Seen
from torch import Tensor

from visparse.compensation import Proxies

PROXIES = {
    "proxies": Proxies(),
    "4 proxies a tile": Proxies(per_tile=4),
    "agents": Proxies(kind="agent"),
    "samples": Proxies(kind="sample"),
    "2 levels": Proxies(levels=2),
}
EVERY = ("dropped", "x rho", *PROXIES)
SCORES = ("pooled", "mass", "mass_variance", "residual")
SPREAD = tuple(f"{score}, spread" for score in SCORES[1:])
EXACT_SAMPLE = "mass_variance, every query"  # the others by mass look at every fourth

# tiles kept -> by what, compensated how
STUDY: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    9: (("window", *SCORES, *SPREAD, EXACT_SAMPLE), EVERY),
    25: (("window", *SCORES, *SPREAD), EVERY),
    4: ((*SCORES[1:], *SPREAD), ("proxies",)),
    16: ((*SCORES[1:], *SPREAD), ("proxies",)),
    0: (("none",), ("proxies", "4 proxies a tile")),
}


class Cell(NamedTuple):
    """What one row of the result is about."""

    tiles: int
    choice: str
    compensation: str


class Scores:
    """Scores of a layer, each computed once, when it is asked for."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Tensor:
        if name == EXACT_SAMPLE:
            return shipped_scores(self.layer, "mass_variance", sample=1)
        return residual_scores(self.layer) if name == "residual" else shipped_scores(self.layer, name)

    @cached_property
    def nothing(self) -> Tensor:
        """No tile kept, bool [1, H, tiles, tiles]."""
        tiles = self.layer.tiles
        return torch.zeros(1, self.layer.heads, tiles.visual_q, tiles.visual_k, dtype=torch.bool)

    def kept(self, choice: str, tiles: int) -> Tensor:
        """Return the tiles that are seen exactly, bool [1, H, tiles, tiles]."""
        if choice == "none":
            return self.nothing
        if choice == "window":
            return window(self.layer, tiles)
        name = choice.removesuffix(", spread")
        return by_score(self[name], tiles, spread=name != choice)


def compensated(seen: Seen, compensation: str) -> Tensor:
    """Return the output with what stands in for the tiles that were dropped, [1, N, H, 64]."""
    if compensation == "dropped":
        return seen.out
    return seen.scaled() if compensation == "x rho" else seen.with_proxies(PROXIES[compensation])


def outputs(
    layer: Layer, study: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = STUDY
) -> Iterator[tuple[Cell, Tensor]]:
    """Give every cell of a study and its output, [1, N, H, 64]."""
    scores = Scores(layer)
    for tiles, (choices, compensations) in study.items():
        for choice in choices:
            seen = Seen.run(layer, scores.kept(choice, tiles))
            for compensation in compensations:
                yield Cell(tiles, choice, compensation), compensated(seen, compensation)
