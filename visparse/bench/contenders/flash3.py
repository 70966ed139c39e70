"""FlashAttention-3, dense: the forward-only wheel `fa3-fwd`, or the fuller build under the original name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from visparse.bench.contenders.base import Contender, not_cuda, not_dense, not_installed
from visparse.bench.problem import Problem

_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


class Flash3(Contender):
    """`flash_attn_func` of FlashAttention-3."""

    name = "fa3"
    dense = True

    def absent(self) -> str | None:
        """Neither module is there."""
        reasons = [not_installed(module, "fa3-fwd") for module in _MODULES]
        return reasons[0] if all(reasons) else None

    def can_run(self, problem: Problem) -> str | None:
        """Dense on CUDA."""
        return not_dense(problem) or not_cuda(problem)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """It takes heads behind tokens, as visparse does."""
        module = next(name for name in _MODULES if not_installed(name, "") is None)
        attention = import_module(module).flash_attn_func
        q, k, v = problem.inputs.q, problem.inputs.k, problem.inputs.v

        def call() -> Tensor:
            return first(attention(q, k, v))

        return call


def first(result: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The output of a peer that returns it alone or with more behind it."""
    return result[0] if isinstance(result, (tuple, list)) else result
