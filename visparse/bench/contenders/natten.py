"""NATTEN: the neighbourhood patterns, from the grid itself; its own putting of tokens into tiles is inside the call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from visparse.bench.contenders.base import Contender, not_cuda, not_installed
from visparse.bench.patterns import grid_pattern
from visparse.bench.problem import Problem
from visparse.patterns import Neighborhood


class Natten(Contender):
    """`natten.na1d`, `na2d` or `na3d` with the backend that NATTEN chooses."""

    name = "natten"
    only = ("gna", "gna_strided", "sta")
    setup_seconds = 30.0

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("natten", "natten")

    def can_run(self, problem: Problem) -> str | None:
        """Windows on a grid without text."""
        if problem.case.before or problem.case.after:
            return "extra tokens that see and are seen by everything"
        return not_cuda(problem)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Axes of length 1 are left away."""
        pattern = grid_pattern(problem.pattern, problem.case)
        if not isinstance(pattern, Neighborhood):
            raise ValueError(f"pattern: wanted a neighbourhood, got {problem.pattern}")
        case = problem.case
        axes = [axis for axis in range(3) if case.grid[axis] > 1]
        attention = getattr(import_module("natten"), f"na{len(axes)}d")
        window, stride = (
            tuple(size[axis] for axis in axes) if isinstance(size, tuple) else size
            for size in (pattern.window, pattern.stride)
        )
        shape = (case.batch, *(case.grid[axis] for axis in axes), case.heads, case.head_dim)
        q, k, v = (x.view(shape) for x in (problem.inputs.q, problem.inputs.k, problem.inputs.v))

        def call() -> Tensor:
            out: Tensor = attention(q, k, v, kernel_size=window, stride=stride)
            return out.view(problem.inputs.q.shape)

        return call

    def facts(self, problem: Problem) -> dict[str, Any]:
        """Whether its compiled kernels are there."""
        return {"variant": "libnatten" if getattr(import_module("natten"), "HAS_LIBNATTEN", False) else "flex"}
