"""FlashAttention-4 (CuTe): dense, and block-sparse with whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from visparse.bench.contenders.base import Contender, not_cuda, not_dense, not_installed
from visparse.bench.contenders.flash3 import first
from visparse.bench.contenders.slots import Slots, block_rows, not_whole_blocks
from visparse.bench.problem import Built, Problem

_BLOCK = 128


class Flash4(Contender):
    """`flash_attn.cute.flash_attn_func` without lists."""

    name = "fa4"
    dense = True
    setup_seconds = 40.0

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("flash_attn.cute", "flash-attn-4")

    def can_run(self, problem: Problem) -> str | None:
        """Dense on CUDA."""
        return not_dense(problem) or not_cuda(problem)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """It takes heads behind tokens."""
        attention = import_module("flash_attn.cute").flash_attn_func
        q, k, v = problem.inputs.q, problem.inputs.k, problem.inputs.v
        return lambda: first(attention(q, k, v))


class Flash4Sparse(Contender):
    """The same with `block_sparse_tensors`, in blocks of 128 x 128. Tokens are put into blocks inside the call."""

    name = "fa4_sparse"
    setup_seconds = 40.0

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("flash_attn.cute", "flash-attn-4")

    def built(self, problem: Problem) -> Built:
        """Blocks of 128 x 128."""
        return problem.built(_BLOCK, _BLOCK)

    def can_run(self, problem: Problem) -> str | None:
        """Whole blocks, and padding only behind the last token."""
        reason = not_cuda(problem)
        if reason is not None:
            return reason
        lists = self.built(problem).lists
        if lists.partial_indices.numel():
            return "blocks with a bit mask (its masks are functions written in CuTe)"
        reason = not_whole_blocks(lists)
        if reason is not None:
            return reason
        slots = Slots(lists)
        return "padding between tokens" if slots.padded and not slots.plain else None

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Translate the lists."""
        attention = import_module("flash_attn.cute").flash_attn_func
        make = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        lists = self.built(problem).lists
        count, index = block_rows(lists)
        sparse = make(
            mask_block_cnt=torch.zeros_like(count)[None],
            mask_block_idx=torch.zeros_like(index[..., :1])[None].contiguous(),
            full_block_cnt=count[None],
            full_block_idx=index[None],
            block_size=(_BLOCK, _BLOCK),
        )
        slots = Slots(lists)
        q, k, v = problem.inputs.q, problem.inputs.k, problem.inputs.v

        def call() -> Tensor:
            if slots.plain:
                return first(attention(q, k, v, block_sparse_tensors=sparse))
            out = attention(slots.queries(q, 1), slots.keys(k, 1), slots.keys(v, 1), block_sparse_tensors=sparse)
            return slots.tokens(first(out), 1)

        return call
