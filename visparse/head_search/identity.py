"""Identity: what two parts of one search must agree in, so that a work file can be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from visparse.head_search.searcher import Searcher

_SETTINGS = (
    "family",
    "dense_steps",
    "refresh",
    "judge",
    "rows",
    "every",
    "seed",
    "rule",
    "candidates",
    "probe",
    "per_tile",
)


def identity_of(searcher: Searcher, model: nn.Module) -> dict[str, Any]:
    """What a search is of and how it measures; the goal is not among it.

    Args:
        searcher: all but its work file is known.
        model: the denoiser itself.
    """
    settings = searcher.settings
    weights = next(p for p in model.parameters() if p.ndim > 1 and p.is_floating_point())
    return {
        "model": vars(searcher.model).copy(),
        "weights": float(weights.detach().flatten()[:4096].double().abs().sum()),
        "prompts": list(settings.prompts),
        "call": {name: repr(value) for name, value in sorted(settings.call.items())},
        "inputs": [len(run) for run in searcher.inputs],
        "steps": searcher.total,
        "patterns": {name: one.to_dict() for name, one in sorted(settings.patterns.items())},
        **{name: getattr(settings, name) for name in _SETTINGS},
        **({} if settings.blocks is None else {"blocks": list(settings.blocks)}),
        **({} if searcher.timed is None else {"timed": [_shapes(arguments) for arguments in searcher.timed]}),
        **({} if searcher.timer is None else {"timer": True}),
    }


def _shapes(arguments: Any) -> Any:
    """Of the tensors of a step's call, or of its calls."""
    if not isinstance(arguments, Mapping):
        return [_shapes(one) for one in arguments]
    return {name: list(value.shape) for name, value in sorted(arguments.items()) if isinstance(value, Tensor)}
