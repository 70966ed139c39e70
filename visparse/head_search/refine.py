"""Refine: several allocations, judged by the model's output with the whole plan at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visparse.head_search.candidates import Candidate
from visparse.patterns import Dense, Selector
from visparse.plan import SparsePlan


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to allocate.

    Attributes:
        name: in the plan's record.
        family: of candidates.
        only: which of them; None: all.
        weights: function (number of scored layers) -> by how much the errors of each count.
    """

    name: str
    family: str
    only: Callable[[Candidate], bool] | None = None
    weights: Callable[[int], list[float]] = field(default=lambda layers: [1.0] * layers)


def variants_of(families: Sequence[str]) -> list[Variant]:
    """The ways to allocate, the most promising first.

    Args:
        families: that were scored.
    """
    found = [Variant(name=family, family=family) for family in reversed(families)]
    if "foveal" in families:
        found.insert(1, Variant(name="foveal, by content", family="foveal", only=_by_content))
        found.append(
            Variant(name="foveal, by content, first layers", family="foveal", only=_by_content, weights=_first)
        )
        found.append(Variant(name="foveal, first layers", family="foveal", weights=_first))
        found.append(Variant(name="foveal, last layers", family="foveal", weights=_last))
    if "plain" in families:
        found.append(Variant(name="plain, first layers", family="plain", weights=_first))
        found.append(Variant(name="plain, last layers", family="plain", weights=_last))
    return found


def output_errors(
    run: Callable[[int], Any], pipe: Any, plans: Mapping[str, SparsePlan], prompts: int
) -> dict[str, float]:
    """Relative error of the model's output under each plan, mean over prompts.

    Args:
        run: function (prompt) -> what the pipeline returns.
        pipe: the pipeline.
        plans: to be judged.
        prompts: how many.
    """
    import visparse

    dense = [_latents(run(prompt)) for prompt in range(prompts)]
    found: dict[str, float] = {}
    for name, plan in plans.items():
        with visparse.sparsify(pipe, plan):
            made = [_latents(run(prompt)) for prompt in range(prompts)]
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(made, dense, strict=True)]
        found[name] = sum(errors) / len(errors)
    return found


def _latents(output: Any) -> Tensor:
    made = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(made).double().cpu()


def _by_content(candidate: Candidate) -> bool:
    return isinstance(candidate.pattern, (Selector, Dense))


def _first(layers: int) -> list[float]:
    return [2.0 - 1.5 * layer / max(layers - 1, 1) for layer in range(layers)]


def _last(layers: int) -> list[float]:
    return _first(layers)[::-1]
