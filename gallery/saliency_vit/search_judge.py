"""What a plan does to the saliency ViT: its features and its maps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from maps import compare
from torch import Tensor
from vit import SaliencyViT

import visparse
from visparse import SparsePlan
from visparse.measure.attention import RolledKeys


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
