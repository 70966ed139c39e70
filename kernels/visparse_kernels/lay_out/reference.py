"""The definition of `lay_out`, computed plainly."""

import torch
from torch import Tensor


def can_run(device: torch.device, dtype: torch.dtype, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None: it serves every case."""
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, block_q: int, block_k: int, parts: int, pool: int
) -> tuple[Tensor | None, ...]:
    """Copy, and average; see `visparse_kernels.lay_out.api.lay_out`.

    Returns:
        The parts of `InOrder`, in their order.
    """
    queries, keys = (order[order >= 0].long() for order in (q_order, k_order))
    rows = [
        x.transpose(1, 2).index_select(2, at).contiguous().transpose(1, 2)
        for x, at in ((q, queries), (k, keys), (v, keys))
    ]
    q_mean = k_mean = pooled_k = pooled_v = None
    if parts:
        q_mean = _means(q, q_order.view(-1, block_q)).transpose(1, 2)
        k_mean = _means(k, k_order.view(-1, block_k // parts)).transpose(1, 2)
    if pool:
        pooled_k, pooled_v = (_means(x, k_order.view(-1, block_k // pool)).to(x.dtype) for x in (k, v))
    return *rows, q_mean, k_mean, pooled_k, pooled_v


def _means(x: Tensor, rows: Tensor) -> Tensor:
    """Average the tokens of each row of a table [n, w], -1 padding: [B, n, H, D], in fp32 (fp64 for fp64)."""
    real = rows >= 0
    copied = x[:, rows.clamp(min=0).long()].to(torch.promote_types(x.dtype, torch.float32))
    copied = copied.masked_fill(~real[..., None, None], 0.0)
    return copied.sum(2) / real.sum(1).clamp(min=1)[:, None, None]
