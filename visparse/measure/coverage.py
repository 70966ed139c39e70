"""How much of its attention a run really computed, read from the front door's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Density of one run's self-attention.

    Args:
        density: kept pairs over all pairs, mean over sparse calls; None where no call was sparse.
        block_density: visited blocks over all blocks, mean over sparse calls; None where no call was sparse.
        run_block_density: the same over all calls of the run; dense calls count as 1.
        dense_steps: steps at the start that ran dense.
        impl: implementation of `attend`.
        grid: `[frames, height, width]` in tokens.
        fallbacks: reasons for calls that ran dense against the plan.
    """

    density: float | None
    block_density: float | None
    run_block_density: float | None
    dense_steps: int
    impl: str | None = None
    grid: list[int] | None = None
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def dense(cls, steps: int) -> Coverage:
        """A run without any sparse call."""
        return cls(density=1.0, block_density=1.0, run_block_density=1.0, dense_steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "fallbacks": list(self.fallbacks)}


def read_coverage(report: Mapping[str, Any]) -> Coverage:
    """Coverage of the last run that a handle saw.

    Args:
        report: `handle.report().to_dict()`.

    Returns:
        Means over all self-attention calls of all denoisers.

    Raises:
        ValueError: no call of self-attention was seen.
    """
    models = report["models"]
    layers = [layer for model in models for layer in model["layers"]]
    sparse = sum(layer["sparse_calls"] for layer in layers)
    dense = sum(layer["dense_calls"] for layer in layers)
    if sparse + dense == 0:
        raise ValueError("report: no call of self-attention was seen; report after a run, before restore")
    blocks = _sum_over_calls(layers, "block_density")
    reasons = dict.fromkeys(reason for layer in layers for reason in layer["fallbacks"])
    first = models[0]
    return Coverage(
        density=_sum_over_calls(layers, "density") / sparse if sparse else None,
        block_density=blocks / sparse if sparse else None,
        run_block_density=(blocks + dense) / (sparse + dense),
        dense_steps=first["dense_steps"] or 0,
        impl=first["impl"],
        grid=first["grid"],
        fallbacks=tuple(reasons),
    )


def _sum_over_calls(layers: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(layer["sparse_calls"] * layer[name] for layer in layers if layer["sparse_calls"])
