"""What a plan does to the saliency ViT: its features, its maps, and its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
        self.maps = [model.saliency(features).float().cpu() for features in self.features]

    def quality(self, plan: SparsePlan | None) -> dict[str, Any]:
        """Errors of the features and agreement of the maps; of None: the floor, dense with another order of addition.

        Args:
            plan: of the backbone.
        """
        errors: list[float] = []
        agreed: list[dict[str, Any]] = []
        with installed(self.model, plan):
            for batch, dense, maps in zip(self.pictures, self.features, self.maps, strict=True):
                found = self.model.features(batch)
                difference = (found.float() - dense.float()).flatten(1).norm(dim=1)
                errors += (difference / dense.float().flatten(1).norm(dim=1)).tolist()
                got = self.model.saliency(found).float().cpu()
                agreed += [compare(one, wanted) for one, wanted in zip(got, maps, strict=True)]
        return {
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
        }


def installed(model: SaliencyViT, plan: SparsePlan | None, **settings: Any) -> AbstractContextManager[Any]:
    """Put a plan on the backbone; None: keys and values in another order, which is as exact as dense attention."""
    if plan is None:
        return RolledKeys()
    return visparse.sparsify(model.backbone, plan, strict=True, **settings)


def times(model: SaliencyViT, batch: Tensor, plan: SparsePlan | None) -> dict[str, float]:
    """Milliseconds of the backbone and of its attention for one picture, each the median of several.

    Args:
        model: dense.
        batch: [B, 3, side, side].
        plan: of the backbone; None: dense.
    """
    chosen = plan or visparse.SparsePlan.from_dict(_DENSE)
    with nullcontext() if plan is None else installed(model, plan):
        whole = _median(lambda: model.features(batch), batch.device)
    with installed(model, chosen, timing=True):
        routes = session_of(model.backbone).router.routes  # type: ignore[union-attr]

        def attention() -> float:
            before = sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes)
            model.features(batch)
            return sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes) - before

        inside = _median(attention, batch.device)
    return {"milliseconds": 1000 * whole / len(batch), "attention_milliseconds": 1000 * inside / len(batch)}


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
