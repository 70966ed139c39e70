"""FastVideo's kernels: sliding tile attention, and the block-sparse part of video sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from visparse.bench.contenders.base import Contender, not_cuda, not_installed
from visparse.bench.contenders.flash3 import first
from visparse.bench.contenders.slots import Slots, block_rows, not_filled_blocks
from visparse.bench.problem import Built, Problem
from visparse.layout import Layout
from visparse.order import order_table

_TILE = (6, 8, 8)
_GRIDS = ((30, 48, 80), (36, 48, 48), (18, 48, 80))
_BLOCK = 64


class SlidingTile(Contender):
    """`sliding_tile_attention`, all heads with one window. Tokens are put into tiles inside the call."""

    name = "fastvideo_sta"
    only = ("sta",)
    setup_seconds = 20.0

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("fastvideo_kernel", "fastvideo-kernel")

    def can_run(self, problem: Problem) -> str | None:
        """Its three grids, tiles of 6 x 8 x 8, bf16, heads of 128, no text."""
        case = problem.case
        if case.tile != _TILE:
            return "tiles of 6x8x8 only"
        if case.grid not in _GRIDS or case.before or case.after:
            return f"only grids {', '.join('x'.join(map(str, grid)) for grid in _GRIDS)} without text"
        if problem.inputs.q.dtype != torch.bfloat16 or case.head_dim != 128:
            return "bfloat16 and heads of 128 only"
        return not_cuda(problem)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Tables that put tokens into tiles and back."""
        attention = import_module("fastvideo_kernel").sliding_tile_attention
        case = problem.case
        order = order_table(Layout(case.grid), _TILE, 384).to(problem.inputs.q.device).long()
        back = order.argsort()
        q, k, v = problem.inputs.heads_first
        windows = [case.tiles] * case.heads
        shape = "x".join(map(str, case.grid))

        def call() -> Tensor:
            tiled = (x.index_select(2, order) for x in (q, k, v))
            out = attention(*tiled, windows, 0, False, shape)
            return first(out).index_select(2, back).transpose(1, 2)

        return call

    def facts(self, problem: Problem) -> dict[str, Any]:
        """Whether its own CUDA kernel runs, or its Triton one."""
        ops = import_module("fastvideo_kernel.ops")
        return {"variant": "triton" if getattr(ops, "sta_fwd", None) is None else "thunderkittens"}


class VideoSparse(Contender):
    """Its block-sparse forward from lists of 64 x 64 blocks. Tokens are put into blocks inside the call."""

    name = "fastvideo_vsa"
    setup_seconds = 20.0

    def absent(self) -> str | None:
        """The package is not there."""
        return not_installed("fastvideo_kernel", "fastvideo-kernel")

    def built(self, problem: Problem) -> Built:
        """Blocks of 64 x 64."""
        return problem.built(_BLOCK, _BLOCK)

    def can_run(self, problem: Problem) -> str | None:
        """Whole blocks without padding, one sequence, bf16."""
        if problem.inputs.q.dtype != torch.bfloat16 or problem.case.batch != 1:
            return "bfloat16 and batch 1 only"
        return not_cuda(problem) or not_filled_blocks(self.built(problem).lists)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Translate the lists."""
        attention = _forward()
        lists = self.built(problem).lists
        count, index = (x[None] for x in block_rows(lists))
        sizes = torch.full((lists.n_k,), _BLOCK, dtype=torch.int32, device=lists.device)
        slots = Slots(lists)
        q, k, v = problem.inputs.heads_first

        def call() -> Tensor:
            if slots.plain:
                return first(attention(q, k, v, index, count, sizes)).transpose(1, 2)
            out = attention(slots.queries(q, 2), slots.keys(k, 2), slots.keys(v, 2), index, count, sizes)
            return slots.tokens(first(out), 2).transpose(1, 2)

        return call

    def facts(self, problem: Problem) -> dict[str, Any]:
        """Whether its own CUDA kernel is there, or its Triton one runs."""
        forward, _ = import_module("fastvideo_kernel.block_sparse_attn")._get_sm90_ops()
        return {"variant": "triton" if forward is None else "thunderkittens"}


def _forward() -> Callable[..., Any]:
    """The function that takes indices; older versions have it under the names of its two kernels only."""
    module = import_module("fastvideo_kernel.block_sparse_attn")
    public: Callable[..., Any] | None = getattr(module, "block_sparse_attn_from_indices", None)
    hopper: Callable[..., Any] | None = module._get_sm90_ops()[0]
    if public is not None:
        return public
    if hopper is not None:
        return hopper
    triton: Callable[..., Any] = import_module(
        "fastvideo_kernel.triton_kernels.block_sparse_attn_triton"
    ).triton_block_sparse_attn_forward
    return triton
