"""The cheap scores: softmax over the blocks of mean query times mean key; no kernel, no log-sum-exp."""

import torch
from torch import Tensor

from visparse_kernels.block_scores.slots import added_to_logits, gather_rows, real_counts

_LOGITS = 1 << 24  # logits held at once, in elements: 64 MiB in fp32; about three such tables live at a time


def pooled_scores(
    q: Tensor, k: Tensor, q_rows: Tensor, k_rows: Tensor, key_bias: Tensor | None, scale: float, parts: int = 1
) -> Tensor:
    """Compute softmax over J of ``scale * mean(q in I) . mean(k in J) + log(keys in J)``, for J or for its parts.

    Key blocks are cut into parts of equally many slots. The softmax is taken over the parts of all key blocks, and
    weights are summed over the parts of a block. One part is the formula above.

    With a key bias b the mean of the keys has the weights exp(b), and log(sum of exp(b)) takes the place of
    log(keys in J): what a proxy of the block would get from a query at which all logits are equal. A block of padding
    scores 0. Means and products are fp32 (fp64 for fp64 inputs). At 75,600 tokens in blocks of 128, eight parts take
    0.02 % of the multiplications of dense attention; logits are made some query blocks at a time.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        q_rows: int32 [n_q, w_q], the sampled queries of each block, -1 padding.
        k_rows: int32 [n_k, w_k], the keys of each block, -1 padding.
        key_bias: [B or 1, H or 1, Sk], or None.
        scale: factor of the logits.
        parts: of each key block; a divisor of w_k.

    Returns:
        [B, H, n_q, n_k]; rows of query blocks with a real query sum to 1, others are 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = k_rows.reshape(len(k_rows) * parts, -1)
    queries = _sums(q, q_rows, dtype) / real_counts(q_rows).to(dtype)[:, None]
    keys, log_size = _keys(k, rows, key_bias, dtype)
    # a row in which no key is seen is 0 / 0
    seen = (q_rows >= 0).any(1)[:, None] & (log_size > -torch.inf).any(-1)[:, :, None, None]
    return scores_of_means(queries, keys, log_size, scale, parts).masked_fill_(~seen, 0.0)


def scores_of_means(queries: Tensor, keys: Tensor, log_size: Tensor, scale: float, parts: int = 1) -> Tensor:
    """Compute what `pooled_scores` does from means that are known.

    Args:
        queries: fp32 or fp64 [B, H, n_q, D], the mean of each block.
        keys: [B, H, n_k * parts, D], the mean of each part of a key block.
        log_size: [B or 1, H or 1, n_k * parts], logarithms of the sizes of the parts; -inf for one without keys. One
            part at least has keys.
        scale: factor of the logits.
        parts: of each key block.

    Returns:
        [B, H, n_q, n_k]; rows sum to 1.
    """
    batch, heads, _, _ = queries.shape
    log_size = log_size.expand(batch, heads, -1)
    step = max(1, _LOGITS // (batch * heads * keys.shape[2]))
    found = []
    for some in queries.split(step, 2):
        logits = torch.baddbmm(
            log_size.flatten(0, 1)[:, None], some.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale
        )
        weights = logits.softmax(-1)
        found.append(weights if parts == 1 else weights.unflatten(-1, (-1, parts)).sum(-1))
    return (torch.cat(found, 1) if len(found) > 1 else found[0]).unflatten(0, (batch, heads))


def _keys(k: Tensor, rows: Tensor, key_bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Average the keys of each row of a table: means [B, H, n, D] and log of their sizes [B or 1, H or 1, n]."""
    added = added_to_logits(key_bias, rows, dtype)
    log_size = added.logsumexp(-1)
    if key_bias is None:
        return _sums(k, rows, dtype) / real_counts(rows).to(dtype)[:, None], log_size
    weight = (added - log_size.clamp(min=torch.finfo(dtype).min)[..., None]).exp()
    copied = gather_rows(k, rows).unflatten(2, tuple(rows.shape))
    return (weight[..., None] * copied).sum(3), log_size


def _sums(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of x [B, S, H, D] in each block: [B, H, n, D]."""
    return gather_rows(x, rows).unflatten(2, tuple(rows.shape)).sum(3, dtype=dtype)
