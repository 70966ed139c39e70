"""What a plan does to the saliency ViT: its features, its maps, and its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from maps import compare
from torch import Tensor
from vit import SaliencyViT

import visparse
from visparse import SparsePlan
from visparse.measure.attention import RolledKeys
from visparse.session import session_of

_REPEATS = 7
_SECONDS = 1.5  # a measurement of time takes about so long at most


class Held:
    """Pictures that no search has seen, with what the dense model makes of them."""

    def __init__(self, model: SaliencyViT, pictures: Sequence[Tensor]) -> None:
        """Run the model dense.

        Args:
            model: dense.
            pictures: batches [B, 3, side, side].
        """
        self.model, self.pictures = model, list(pictures)
        self.features = [model.features(batch) for batch in self.pictures]
        self.maps = [model.saliency(features).float() for features in self.features]

    def quality(self, plan: SparsePlan | None, batches: int | None = None) -> dict[str, Any]:
        """Errors of the features and agreement of the maps; of None: the floor, dense with another order of addition.

        Args:
            plan: of the backbone.
            batches: only so many of the batches, the first ones; None: all.
        """
        errors: list[float] = []
        agreed: list[dict[str, Any]] = []
        parts = list(zip(self.pictures, self.features, self.maps, strict=True))
        with installed(self.model, plan):
            for batch, dense, maps in parts[:batches]:
                found = self.model.features(batch)
                difference = (found.float() - dense.float()).flatten(1).norm(dim=1)
                errors += (difference / dense.float().flatten(1).norm(dim=1)).tolist()
                got = self.model.saliency(found).float()
                agreed += [compare(one, wanted) for one, wanted in zip(got, maps, strict=True)]
        return {
            "photographs": len(errors),
            "feature_error": round(statistics.mean(errors), 6),
            "feature_error_max": round(max(errors), 6),
            **{
                name: round(function(one[key] for one in agreed), 5)
                for name, key, function in (
                    ("correlation", "correlation", statistics.mean),
                    ("correlation_min", "correlation", min),
                    ("psnr", "psnr", statistics.mean),
                    ("psnr_min", "psnr", min),
                )
            },
            "feature_errors": [round(error, 4) for error in errors],
            "correlations": [round(one["correlation"], 4) for one in agreed],
        }


def installed(model: SaliencyViT, plan: SparsePlan | None, **settings: Any) -> AbstractContextManager[Any]:
    """Put a plan on the backbone; None: keys and values in another order, which is as exact as dense attention."""
    if plan is None:
        return RolledKeys()
    return visparse.sparsify(model.backbone, plan, strict=True, **settings)


@dataclass(frozen=True)
class Times:
    """Milliseconds for one picture.

    Attributes:
        whole: of the backbone.
        attention: of its attention. On a CPU it is timed layer by layer. An accelerator works while the host goes on,
            so there it is the whole time less what a dense call takes besides attention.
    """

    whole: float
    attention: float

    @property
    def besides(self) -> float:
        """What is not attention."""
        return self.whole - self.attention


def times(model: SaliencyViT, batch: Tensor, plan: SparsePlan | None, dense: Times | None = None) -> Times:
    """Measure a plan; medians of several calls.

    Args:
        model: dense.
        batch: [B, 3, side, side].
        plan: of the backbone; None: dense.
        dense: times of the dense model, on an accelerator.
    """
    with nullcontext() if plan is None else installed(model, plan):
        whole = 1000 * _median(lambda: model.features(batch), batch.device) / len(batch)
    if dense is not None and batch.device.type != "cpu":
        return Times(whole, whole - dense.besides)
    with installed(model, plan or SparsePlan.from_dict(_DENSE), timing=True):
        routes = session_of(model.backbone).router.routes  # type: ignore[union-attr]

        def attention() -> float:
            before = sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes)
            model.features(batch)
            return sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes) - before

        return Times(whole, 1000 * _median(attention, batch.device) / len(batch))


_DENSE = {"schema": 1, "name": "dense", "patterns": {"dense": {"name": "dense"}}, "default": "dense"}


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call after two that do not count; what it returns counts instead where that is a number."""
    run(), run()
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < _REPEATS and (len(found) < 3 or time.perf_counter() - begun < _SECONDS):
        started = time.perf_counter()
        own = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(own if isinstance(own, float) else time.perf_counter() - started)
    return statistics.median(found)
