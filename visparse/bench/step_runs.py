"""Forwards of a denoiser as steps of runs, and what visparse counted in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visparse.bench.models import Architecture
from visparse.handle import Handle

MOST_STEPS = 100
_FALL = 64 / 65  # of the timestep from one step to the next; bfloat16 rounds by less


class Forwards:
    """One forward after the other, at the usual timestep or as steps of runs.

    visparse reads the step of a bare denoiser from the timestep: one that falls is the next step, one that rises begins
    a new run.

    Attributes:
        moment: None: each forward has the usual timestep. An int: so many steps does the next forward lie behind the
            usual timestep (before it where negative); each forward adds 1.
    """

    def __init__(
        self, model: Architecture, denoiser: Any, inputs: Mapping[str, Any], before: Callable[[], None]
    ) -> None:
        """Run a denoiser.

        Args:
            model: what it is.
            denoiser: as `visparse.bench.step_build.build` makes it.
            inputs: arguments of its forward, by name.
            before: called before each forward; may raise.
        """
        self.model, self.denoiser, self.inputs, self.before = model, denoiser, dict(inputs), before
        self.moment: int | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The denoiser's output."""
        self.before()
        inputs = self.inputs
        if self.moment is not None:
            usual: Tensor = inputs["timestep"]
            inputs = {**inputs, "timestep": (usual * _FALL**self.moment).to(usual.dtype)}
            self.moment += 1
        return self.denoiser(**inputs, return_dict=False)[0]


class Calls(NamedTuple):
    """Calls of all layers in the present run (since `sparsify` where the plan does not need steps)."""

    sparse: int
    measured: int
    dense: int  # neither sparse nor measured


def calls_of(handle: Handle) -> Calls:
    """What visparse counted so far."""
    layers = handle.report().models[0].layers
    measured = sum(layer.measured_calls for layer in layers)
    return Calls(
        sparse=sum(layer.sparse_calls for layer in layers),
        measured=measured,
        dense=sum(layer.dense_calls for layer in layers) - measured,
    )


def demand_calls(handle: Handle, since: Calls, *, sparse: int = 0, measured: int = 0) -> None:
    """Refuse a time that was not of what it is called.

    Args:
        handle: of the contender.
        since: what had been counted before the forwards in question.
        sparse: calls that must have been sparse.
        measured: calls that must have measured.

    Raises:
        RuntimeError: there were more or fewer of a kind.
    """
    found = Calls(*(now - then for now, then in zip(calls_of(handle), since, strict=True)))
    wanted = Calls(sparse, measured, 0)
    if found != wanted:
        raise RuntimeError(f"not the steps that were to be timed: wanted {wanted}, visparse counted {found}")


def state_bytes(handle: Handle) -> int:
    """Bytes that are kept between steps at present."""
    return handle.report().models[0].state_bytes or 0
