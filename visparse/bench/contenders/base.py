"""What a contender is."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from visparse.bench.problem import Built, Problem


class Contender(ABC):
    """One way to compute attention. Imports of peers happen in `prepare` only.

    Attributes:
        name: as on the command line and in the results.
        dense: computes every pair and takes no lists; only runs on the pattern `dense`.
        setup_seconds: what its first call may take, for compilation.
        only: the patterns on which it takes part; None: all.
        compiles_each: compiles anew for each problem, so it takes part unasked only where the case says so.
    """

    name: str
    dense: bool = False
    only: tuple[str, ...] | None = None
    setup_seconds: float = 2.0
    compiles_each: bool = False

    def absent(self) -> str | None:
        """Why it cannot run on this machine at all, such as a package that is not installed; None where it can."""
        return None

    def built(self, problem: Problem) -> Built:
        """The lists that it gets."""
        return problem.plain

    @abstractmethod
    def can_run(self, problem: Problem) -> str | None:
        """Why it cannot serve a problem; None where it can."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Return the call to time; `tokens` makes `[batch, tokens, heads, head_dim]` of what it gives.

        What belongs to a step of a model is inside the call, such as putting tokens into tiles and back. What a model
        could arrange once, such as translated lists or heads in front of tokens, is done before.
        """

    def tokens(self, problem: Problem, out: Tensor) -> Tensor:
        """Bring what the call gives into the order of tokens, for the check; not timed."""
        return out

    def facts(self, problem: Problem) -> dict[str, Any]:
        """More to say about a row of results."""
        return {}


def not_installed(module: str, package: str) -> str | None:
    """Say that a module is not there; None where it is. Does not import it, only the packages around it."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return None if found else f"{module} is not installed (pip install {package})"


def not_cuda(problem: Problem) -> str | None:
    """Say that the problem is not on CUDA; None where it is."""
    return None if problem.inputs.q.is_cuda else "needs CUDA"


def not_dense(problem: Problem) -> str | None:
    """Say that the problem is not dense; None where it is."""
    return None if problem.pattern == "dense" else "computes dense attention only"
