"""Residuals of one denoiser: how they are stored, fixed when the first call of a size comes."""

from __future__ import annotations

import torch
from torch import Tensor

from visparse.compensation.config import ReuseResidual
from visparse.compensation.residual_groups import TokenGroups
from visparse.compensation.residual_sizes import StorageChoice, choose_storage
from visparse.compensation.residual_store import Stored, store
from visparse.layout import Layout


class Residuals:
    """Stores the residuals of all layers of one denoiser.

    Args:
        settings: of the plan.
        layers: layers that keep a residual.
        head_dim: numbers per head.

    Raises:
        ValueError: a rank that no head of this model has.
    """

    def __init__(self, settings: ReuseResidual, layers: int, head_dim: int) -> None:
        """Check what depends on the model."""
        if settings.storage == "low-rank" and settings.rank > head_dim:
            raise ValueError(
                f"residual: rank: wanted at most {head_dim} (the head dimension of this model), got {settings.rank}; "
                "16 is usual"
            )
        self.settings, self.layers = settings, layers
        self._groups: dict[tuple[Layout, tuple[int, int, int], torch.device], TokenGroups] = {}
        self._choices: dict[tuple[Layout, torch.Size, torch.dtype], StorageChoice] = {}

    def check(self, layout: Layout, like: Tensor) -> None:
        """Refuse a call whose residual will not fit into memory; cheap after the first call of a size.

        Args:
            layout: grid and extra tokens.
            like: [B, N, H, D], shape and dtype of the residual.

        Raises:
            ValueError: the memory of the plan is too small for any storage.
        """
        if self.settings.storage == "auto":
            self._choose(layout, like)

    def store(self, residual: Tensor, layout: Layout) -> Stored:
        """Store a residual, [B, N, H, D], as the plan says."""
        settings = self.settings
        storage, group = settings.storage, settings.group
        if storage == "auto":
            chosen = self._choose(layout, residual)
            storage, group = chosen.storage, chosen.tile or group
        groups = None
        if storage.startswith("average"):
            key = (layout, group, residual.device)
            if key not in self._groups:
                self._groups[key] = TokenGroups.from_tiles(layout, group).to(residual.device)
            groups = self._groups[key]
        return store(residual, storage, groups=groups, rank=settings.rank if storage == "low-rank" else None)

    def clear(self) -> None:
        """Forget all tables."""
        self._groups.clear()
        self._choices.clear()

    def _choose(self, layout: Layout, like: Tensor) -> StorageChoice:
        """What "auto" is for a size: all layers and both passes of guidance count."""
        key = (layout, like.shape, like.dtype)
        if key not in self._choices:
            batch, _, heads, head_dim = like.shape
            try:
                self._choices[key] = choose_storage(
                    layout,
                    layers=self.layers,
                    heads=heads,
                    head_dim=head_dim,
                    branches=2 if batch == 1 else 1,
                    batch=batch,
                    dtype_bytes=like.element_size(),
                    budget_bytes=int(self.settings.memory * 2**30),
                )
            except ValueError as error:
                raise ValueError(
                    f"residual: memory: {self.settings.memory:g} GiB is too little for {layout.tokens} tokens: {error}"
                ) from error
        return self._choices[key]
