"""The definition of `block_scores`, computed plainly, some query blocks at a time."""

import torch
from torch import Tensor

from visparse_kernels.block_scores.slots import added_to_logits, gather_lse, gather_rows, real_counts

_SCRATCH = 1 << 25  # logits held at once, in elements


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, rows_q: int, rows_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None: it serves every case."""
    return None


def run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    variance: bool,
) -> Tensor:
    """Compute the scores in fp32, or in fp64 where the inputs are fp64.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        lse: [B, H, Sq], log-sum-exp of dense attention, natural logarithm.
        q_rows: int32 [n_q, w_q], the sampled queries of each block, -1 padding.
        k_rows: int32 [n_k, w_k], the keys of each block, -1 padding.
        key_bias: [B or 1, H or 1, Sk], or None.
        scale: factor of the logits.
        variance: multiply the mass of a block, query by query, by the variance of the logits inside it.

    Returns:
        [B, H, n_q, n_k], in the dtype of the computation.
    """
    (batch, _, heads, _), (n_q, w_q), (n_k, w_k) = q.shape, q_rows.shape, k_rows.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = gather_rows(k, k_rows).to(dtype).transpose(-1, -2)
    added = added_to_logits(key_bias, k_rows, dtype)
    seen = (added > -torch.inf)[:, :, None, None]
    n_seen = seen.sum(-1).clamp(min=1)
    scores = torch.empty(batch, heads, n_q, n_k, dtype=dtype, device=q.device)
    step = max(1, _SCRATCH // (batch * heads * w_q * n_k * w_k))
    for first in range(0, n_q, step):
        rows = q_rows[first : first + step]
        logits = (gather_rows(q, rows).to(dtype) @ keys * scale).view(batch, heads, -1, w_q, n_k, w_k)
        logits = logits + added[:, :, None, None]
        top = gather_lse(lse, rows, dtype).view(batch, heads, -1, w_q, 1)
        weight = (logits - top[..., None]).exp().sum(-1)
        if variance:
            finite = torch.where(seen, logits, 0.0)
            away = torch.where(seen, finite - (finite.sum(-1) / n_seen)[..., None], 0.0)
            weight = weight * (away.square().sum(-1) / n_seen)
        scores[:, :, first : first + step] = weight.sum(3) / real_counts(rows).to(dtype)[:, None]
    return scores
