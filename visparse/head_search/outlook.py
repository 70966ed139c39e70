"""Outlook: what a search would do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from visparse.head_search.candidates import Candidates
from visparse.head_search.costs import Costs
from visparse.layout import Layout
from visparse.rules import ModelFingerprint


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a search would do; `str()` is a table for people, `to_dict()` is JSON.

    Attributes:
        model: fingerprint.
        ready_layout: grid and extra tokens.
        share: of attention in a dense step.
        candidates: with those that were left out.
        costs: of the candidates.
        ceilings: family -> speed-up of a run if sparse attention cost nothing.
        targets: family -> attention in a sparse step that the goal leaves; None where the goal is no time.
        judge, measure: steps at which candidates are scored and measured.
        total: steps of a run.
        runs: calibration runs.
        seconds: expected time of the search.
    """

    model: ModelFingerprint
    ready_layout: Layout
    share: float | None
    candidates: Candidates
    costs: Costs
    ceilings: Mapping[str, float]
    targets: Mapping[str, float | None]
    judge: tuple[int, ...]
    measure: tuple[int, ...]
    total: int
    runs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The outlook as JSON values."""
        return {
            "model": asdict(self.model),
            "grid": list(self.ready_layout.grid),
            "tokens": self.ready_layout.tokens,
            "attention_share": self.share,
            "ceilings": dict(self.ceilings),
            "targets": dict(self.targets),
            "candidates": [
                {
                    "name": one.name,
                    "family": one.family,
                    "pattern": one.pattern.to_dict(),
                    "milliseconds": self.costs.milliseconds[place],
                    "block_density": self.costs.block_density[place],
                }
                for place, one in enumerate(self.candidates.kept)
            ],
            "left_out": dict(self.candidates.left_out),
            "judged_steps": list(self.judge),
            "measured_steps": list(self.measure),
            "steps": self.total,
            "runs": self.runs,
            "seconds": self.seconds,
            "rates": self.costs.source,
        }

    def __str__(self) -> str:
        """The outlook as a table."""
        model, layout = self.model, self.ready_layout
        extra = f" + {layout.extra}" if layout.extra else ""
        lines = [
            f"{model.model_class}: {model.layers} layers of {model.heads} heads of {model.head_dim}, grid "
            f"{'x'.join(map(str, layout.grid))}{extra} = {layout.tokens} tokens, {self.total} steps"
        ]
        if self.share is not None:
            ceilings = ", ".join(f"{name} {value:.2f}" for name, value in self.ceilings.items())
            lines.append(
                f"attention is {self.share:.0%} of a dense step; a run gets at most so many times faster: {ceilings}"
            )
        for name, value in self.targets.items():
            if value is not None:
                lines.append(f"{name}: attention may take {value:.1%} of dense attention in a sparse step")
        lines.append(f"  {'family':<7} {'candidate':<12} {'blocks':>7} {'of dense':>8}  pattern")
        for place, one in enumerate(self.candidates.kept):
            blocks, time = self.costs.block_density[place], self.costs.milliseconds[place] / self.costs.dense
            lines.append(f"  {one.family:<7} {one.name:<12} {blocks:>7.1%} {time:>8.1%}  {one.pattern}")
        lines += [f"  left out: {name}: {why}" for name, why in self.candidates.left_out.items()]
        lines.append(f"rates: {self.costs.source}")
        lines.append(
            f"{self.runs} runs of {self.total} steps, scored at {', '.join(map(str, self.judge))}, measured at "
            f"{', '.join(map(str, self.measure)) or 'none'}: about {self.seconds:.0f} s in all"
        )
        return "\n".join(lines)
