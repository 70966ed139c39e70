"""The definition of `attend`: expand the mask and compute plainly."""

import torch
from torch import Tensor

from visparse_kernels.lists import BlockLists
from visparse_kernels.lists_views import order_of, query_block_mask

_SCRATCH = 1 << 25  # logits held at once, in elements


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None: it serves every case."""
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute attention with the expanded mask, some query blocks at a time.

    Computes in fp32, or in fp64 where the inputs are fp64. See `visparse_kernels.attend` for the arguments.

    Returns:
        ``out [B, Sq, H, D]`` in the dtype of q, and ``lse [B, H, Sq]`` in the dtype of the computation.
    """
    batch, q_len, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=dtype, device=q.device)
    step = max(1, _SCRATCH // (batch * heads * lists.block_q * lists.k_len))
    for group in range(lists.groups):
        members = (lists.head_group == group).nonzero()[:, 0]
        keys, values = (x[:, :, members].transpose(1, 2).to(dtype) for x in (k, v))
        order = order_of(lists.q_order, group)
        for first in range(0, lists.n_q, step):
            last = min(first + step, lists.n_q)
            tokens = order[first * lists.block_q : last * lists.block_q]
            real = tokens >= 0
            mask = query_block_mask(lists, group, first, last)[real]
            tokens = tokens[real].long()
            queries = q[:, tokens][:, :, members].transpose(1, 2).to(dtype)
            logits = queries @ keys.transpose(-1, -2) * scale
            if key_bias is not None:
                bias = key_bias.expand(-1, heads, -1)[:, members]
                logits = logits + bias[:, :, None].to(dtype)
            part, part_lse = _softmax_values(logits.masked_fill(~mask, -torch.inf), values)
            at = (slice(None), tokens[:, None], members[None, :])
            out[at] = part.transpose(1, 2).to(q.dtype)
            lse[:, members[:, None], tokens[None, :]] = part_lse
    return out, lse


def _softmax_values(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    lse = logits.logsumexp(-1)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    return (logits - base[..., None]).exp() @ values, lse
