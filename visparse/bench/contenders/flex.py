"""FlexAttention, compiled, with the block mask that visparse's lists give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from visparse.bench.contenders.base import Contender, not_cuda
from visparse.bench.contenders.slots import Slots, no_slots
from visparse.bench.problem import Built, Problem

_BLOCK = 128
_OPTIONS = {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8}  # its own choice of 128 x 128 may not fit


class Flex(Contender):
    """`flex_attention` in blocks of 128 x 128. Gathering into slots is in the call."""

    name = "flex"
    setup_seconds = 25.0
    compiles_each = True

    def built(self, problem: Problem) -> Built:
        """Blocks of 128 x 128."""
        return problem.built(_BLOCK, _BLOCK)

    def can_run(self, problem: Problem) -> str | None:
        """On CUDA; its compiled code for CPUs is another program, and uncompiled it expands the mask."""
        return not_cuda(problem) or no_slots(self.built(problem).lists)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Compile for this mask; `fullgraph` makes a fallback to the expanded mask an error."""
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        lists = self.built(problem).lists
        mask, _ = lists.to_flex()
        slots = Slots(lists)
        q, k, v = problem.inputs.heads_first
        options = _OPTIONS if q.shape[-1] > 64 else None

        def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Any:
            return compiled(q, k, v, block_mask=block_mask, kernel_options=cast(Any, options))

        def call() -> Tensor:
            if slots.plain and not slots.padded:
                return attention(q, k, v, block_mask=mask).transpose(1, 2)
            out = attention(slots.queries(q, 2), slots.keys(k, 2), slots.keys(v, 2), block_mask=mask)
            return slots.tokens(out, 2).transpose(1, 2)

        return call
