"""Is a contender right? Some rows of each head against fp64, by the error rule of the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visparse.bench.problem import Problem
from visparse_kernels import BlockLists
from visparse_kernels.lists_views import order_of, query_block_mask
from visparse_kernels.testing import check_close, eager

_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rows of the true result.

    Args:
        tokens: int64 [heads, n], sampled queries of each head.
        wanted: fp64 [batch, n, heads, head_dim], the truth.
        plain: the same from eager PyTorch in the dtype of the inputs.
    """

    tokens: Tensor
    wanted: Tensor
    plain: Tensor

    def verdict(self, out: Tensor) -> str | None:
        """Say what breaks the error rule in `[batch, tokens, heads, head_dim]`; None where nothing does."""
        heads = torch.arange(self.tokens.shape[0], device=out.device)
        if out.dtype != self.plain.dtype:
            return f"out: wanted {self.plain.dtype}, got {out.dtype}"
        if out.shape[0] != self.wanted.shape[0] or out.ndim != 4 or out.shape[2:] != self.wanted.shape[2:]:
            return f"out: wanted batch, heads and size of {list(self.wanted.shape)}, got {list(out.shape)}"
        rows = out[:, self.tokens.T, heads]
        try:
            check_close("out [batch, sampled row, head, channel]", rows, self.wanted, self.plain, out.dtype)
        except AssertionError as error:
            return str(error)
        return None


def sample_rows(problem: Problem, rows: int = 64, seed: int = 0) -> Sample:
    """Compute some rows of every head in fp64; memory is bounded by one head and one block of queries.

    The first and the last block of queries are always among the eight from which rows are drawn.

    Args:
        problem: what is computed.
        rows: rows of each head.
        seed: of the draw.
    """
    q, k, v, lists = problem.inputs.q, problem.inputs.k, problem.inputs.v, problem.plain.lists
    make = torch.Generator().manual_seed(seed)
    seen = {group: _draw(lists, group, rows, make) for group in sorted(set(lists.head_group.tolist()))}
    found = [seen[int(group)] for group in lists.head_group]
    scale = q.shape[-1] ** -0.5
    wanted, plain = [], []
    for head, (tokens, mask) in enumerate(found):
        own_q, own_k, own_v = q[:, tokens, head : head + 1], k[:, :, head : head + 1], v[:, :, head : head + 1]
        wanted.append(eager(own_q.double(), own_k.double(), own_v.double(), mask[None], scale)[0])
        plain.append(eager(own_q, own_k, own_v, mask[None], scale)[0])
    return Sample(
        tokens=torch.stack([tokens for tokens, _ in found]),
        wanted=torch.cat(wanted, 2),
        plain=torch.cat(plain, 2),
    )


def _draw(lists: BlockLists, group: int, rows: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw queries of a group: int64 [n], and what they see, bool [n, k_len]."""
    order = order_of(lists.q_order, group).view(lists.n_q, lists.block_q)
    some = torch.randint(lists.n_q, (_BLOCKS,), generator=make)
    some[0], some[-1] = 0, lists.n_q - 1
    each = -(-rows // _BLOCKS)
    tokens, masks = [], []
    for block in some.tolist():
        slots = (order[block] >= 0).nonzero()[:, 0]
        slots = slots[torch.randint(len(slots), (each,), generator=make).to(slots.device)]
        tokens.append(order[block, slots].long())
        masks.append(query_block_mask(lists, group, block, block + 1)[slots])
    return torch.cat(tokens), torch.cat(masks)
