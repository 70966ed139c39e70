"""What plans cost: every single pattern of the library, at the size that an amount of attention's time pays for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from visparse import Proxies, SparsePlan
from visparse.head_search.candidates import PARTS, Candidate
from visparse.head_search.costs import make_costs
from visparse.head_search.probe import Line
from visparse.layout import Grid, Layout
from visparse.patterns import Pattern, TopK

UNIFORM = "pooled top-k and proxies"  # one mean of each tile, as published
FINER = "pooled top-k of parts and proxies"
_FARTHER = 3  # costs rise with sizes, but for steps of whole blocks


def rungs_of(grid: Grid) -> dict[str, Sequence[Pattern]]:
    """Every kind of pattern in rising sizes, as the comparison of searched video plans has them; and `UNIFORM`.

    Kinds that are the same on one frame count once, under the first name.
    """
    folder = str(Path(__file__).parents[1] / "search")
    sys.path.append(folder)
    try:
        kinds = importlib.import_module("compare_singles").all_kinds(grid)
    finally:
        sys.path.remove(folder)
    once = {tuple(rungs): kind for kind, rungs in reversed(kinds.items())}
    kinds = {kind: kinds[kind] for kind in kinds if kind in once.values()}
    shares = [n / 200 for n in range(1, 200)]
    finer = [TopK(share=share, score="pooled", parts=PARTS) for share in shares]
    return {UNIFORM: [TopK(share=share, score="pooled") for share in shares], FINER: finer, **kinds}


def family_of(kind: str) -> str:
    """The search's family that a kind of single plans belongs to."""
    return "pooled" if kind in (UNIFORM, FINER) else "plain"


@dataclass
class Prices:
    """Costs of plans in which all heads do the same, as shares of dense attention's time.

    Args:
        layout: of the tokens.
        head_dim, heads: of a layer.
        device: whose measured rates count.
        counted_on: where blocks are counted.
        dense: milliseconds of dense attention for one head.
        lines: family -> what a probe of this machine says of the rates; none: the rates alone count.
        per_tile: proxies of each tile, where there are any.
        blocks: tokens of a tile of queries and of keys; None: the usual ones.
        known: costs that were looked up.
    """

    layout: Layout
    head_dim: int
    heads: int
    device: str
    counted_on: torch.device
    dense: float
    lines: Mapping[str, Line] = field(default_factory=dict)
    per_tile: int = 1
    blocks: tuple[int, int] | None = None
    known: dict[Pattern, float] = field(default_factory=dict)

    def of(self, pattern: Pattern, family: str) -> float:
        """The share of dense attention's time that a pattern takes."""
        if pattern not in self.known:
            one = Candidate("x", family, pattern)
            found = make_costs(
                [one],
                self.layout,
                self.head_dim,
                self.device,
                counted_on=self.counted_on,
                per_tile=self.per_tile,
                blocks=self.blocks,
            )
            line = self.lines.get(family, Line(0.0, 1.0))
            self.known[pattern] = (line.call / self.heads + line.factor * found.milliseconds[0]) / self.dense
        return self.known[pattern]

    def largest(self, rungs: Sequence[Pattern], family: str, share: float) -> tuple[Pattern, float] | None:
        """The size that costs most within a share of dense attention's time, and its cost; None where there is none."""
        low, high = -1, len(rungs)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.of(rungs[middle], family) <= share else (low, middle)
        near = rungs[max(low, 0) : high + 1 + _FARTHER]
        fitting = [(cost, place) for place, one in enumerate(near) if (cost := self.of(one, family)) <= share]
        return (near[max(fitting)[1]], max(fitting)[0]) if fitting else None


def single_plan(kind: str, pattern: Pattern, per_tile: int = 1, blocks: tuple[int, int] | None = None) -> SparsePlan:
    """The plan in which every head of every layer has one pattern; `UNIFORM` and `FINER` with proxies for other tiles.

    Args:
        kind: of `rungs_of`.
        pattern: one of its sizes.
        per_tile, blocks: proxies of each tile, and its queries and keys, for these two.
    """
    return SparsePlan(
        name=kind,
        patterns={"all": pattern.to_dict()},  # type: ignore[dict-item]
        default="all",
        proxies=Proxies(per_tile=per_tile, blocks=blocks) if kind in (UNIFORM, FINER) else None,
    )
