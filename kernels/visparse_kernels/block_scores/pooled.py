"""The cheap scores: softmax over the blocks of mean query times mean key; no kernel, no log-sum-exp."""

import torch
from torch import Tensor

from visparse_kernels.block_scores.slots import added_to_logits, gather_rows, real_counts


def pooled_scores(
    q: Tensor, k: Tensor, q_rows: Tensor, k_rows: Tensor, key_bias: Tensor | None, scale: float
) -> Tensor:
    """Compute softmax over J of ``scale * mean(q in I) . mean(k in J) + log(keys in J)``.

    With a key bias b the mean of the keys has the weights exp(b), and log(sum of exp(b)) takes the place of
    log(keys in J): what a proxy of the block would get from a query at which all logits are equal. A block of padding
    scores 0. Means and products are fp32 (fp64 for fp64 inputs).

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        q_rows: int32 [n_q, w_q], the sampled queries of each block, -1 padding.
        k_rows: int32 [n_k, w_k], the keys of each block, -1 padding.
        key_bias: [B or 1, H or 1, Sk], or None.
        scale: factor of the logits.

    Returns:
        [B, H, n_q, n_k]; rows of query blocks with a real query sum to 1, others are 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    added = added_to_logits(key_bias, k_rows, dtype)
    log_size = added.logsumexp(-1)
    queries = _sums(q, q_rows, dtype) / real_counts(q_rows).to(dtype)[:, None]
    if key_bias is None:
        keys = _sums(k, k_rows, dtype) / real_counts(k_rows).to(dtype)[:, None]
    else:
        weight = (
            added_to_logits(key_bias, k_rows, dtype) - log_size.clamp(min=torch.finfo(dtype).min)[..., None]
        ).exp()
        copied = gather_rows(k, k_rows).unflatten(2, tuple(k_rows.shape))
        keys = (weight[..., None] * copied).sum(3)
    scores = (queries @ keys.transpose(-1, -2) * scale + log_size[:, :, None]).softmax(-1)
    # a row in which no key is seen is 0 / 0
    seen = (q_rows >= 0).any(1)[:, None] & (log_size > -torch.inf).any(-1)[:, :, None, None]
    return scores.masked_fill(~seen, 0.0)


def _sums(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of x [B, S, H, D] in each block: [B, H, n, D]."""
    return gather_rows(x, rows).unflatten(2, tuple(rows.shape)).sum(3, dtype=dtype)
