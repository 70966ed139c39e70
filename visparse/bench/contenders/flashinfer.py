"""FlashInfer's block-sparse attention; heads are folded into rows, since its lists are shared by all heads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from visparse.bench.contenders.base import Contender, not_cuda, not_installed
from visparse.bench.contenders.slots import Slots, block_rows, not_filled_blocks
from visparse.bench.problem import Built, Problem

_BLOCK = 128
_WORKSPACE = 128 * 2**20


class FlashInfer(Contender):
    """`BlockSparseAttentionWrapper` in blocks of 128 x 128.

    Args:
        backend: ``"fa2"`` or ``"fa3"``.
    """

    setup_seconds = 150.0

    def __init__(self, backend: str) -> None:
        """Name it."""
        self.backend = backend
        self.name = f"flashinfer_{backend}"

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("flashinfer", "flashinfer-python")

    def built(self, problem: Problem) -> Built:
        """Blocks of 128 x 128."""
        return problem.built(_BLOCK, _BLOCK)

    def can_run(self, problem: Problem) -> str | None:
        """Whole blocks without padding, one sequence."""
        if problem.case.batch != 1:
            return "one sequence only"
        return not_cuda(problem) or not_filled_blocks(self.built(problem).lists)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Plan once, as a model would for all layers."""
        make = import_module("flashinfer").BlockSparseAttentionWrapper
        lists = self.built(problem).lists
        count, index = block_rows(lists)
        heads, n_q, longest = index.shape
        index = index + lists.n_k * torch.arange(heads, dtype=torch.int32, device=lists.device)[:, None, None]
        used = torch.arange(longest, device=lists.device) < count[..., None]
        offsets = torch.zeros(heads * n_q + 1, dtype=torch.int32, device=lists.device)
        offsets[1:] = count.flatten().cumsum(0)
        dtype = problem.inputs.q.dtype
        wrapper = make(torch.empty(_WORKSPACE, dtype=torch.uint8, device=lists.device), backend=self.backend)
        rows, columns = heads * n_q * _BLOCK, heads * lists.n_k * _BLOCK
        wrapper.plan(
            offsets,
            index[used],
            rows,
            columns,
            _BLOCK,
            _BLOCK,
            1,
            1,
            problem.case.head_dim,
            q_data_type=dtype,
            kv_data_type=dtype,
            o_data_type=dtype,
        )
        slots = Slots(lists)
        q, k, v = (x[0] for x in problem.inputs.heads_first)

        def call() -> Tensor:
            own = (q, k, v) if slots.plain else (slots.queries(q, 1), slots.keys(k, 1), slots.keys(v, 1))
            out = wrapper.run(*(x.reshape(-1, 1, x.shape[-1]) for x in own)).view(heads, -1, own[0].shape[-1])
            return (out if slots.plain else slots.tokens(out, 1)).transpose(0, 1)[None]

        return call
