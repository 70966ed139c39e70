"""The cheap scores: softmax over the blocks of mean query times mean key; no kernel, no log-sum-exp."""

import torch
from torch import Tensor

from visparse_kernels.block_scores.slots import added_to_logits, gather_rows, real_counts

_LOGITS = 1 << 24  # logits held at once, in elements: 64 MiB in fp32; about five such tables live at a time


def pooled_scores(
    q: Tensor,
    k: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    *,
    q_parts: int = 1,
    k_parts: int = 1,
    variance: bool = False,
) -> Tensor:
    """Compute softmax over J of ``scale * mean(q in I) . mean(k in J) + log(keys in J)``, of blocks or of their parts.

    Blocks are cut into parts of equally many slots. The softmax is taken for each part of queries over the parts of
    all key blocks; weights are summed over the parts of a key block, and averaged over the parts of a query block, as
    many queries as they have. One part is the formula above.

    With a key bias b the mean of the keys has the weights exp(b), and log(sum of exp(b)) takes the place of
    log(keys in J): what a proxy of the block would get from a query at which all logits are equal. A block of padding
    scores 0. Means and products are fp32 (fp64 for fp64 inputs). At 75,600 tokens in blocks of 128, 4 parts of queries
    and 8 of keys take 0.1 % of the multiplications of dense attention; logits are made some query blocks at a time.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        q_rows: int32 [n_q, w_q], the sampled queries of each block, -1 padding.
        k_rows: int32 [n_k, w_k], the keys of each block, -1 padding.
        key_bias: [B or 1, H or 1, Sk], or None.
        scale: factor of the logits.
        q_parts: of each query block; a divisor of w_q.
        k_parts: of each key block; a divisor of w_k.
        variance: multiply the weight of a block, for each part of queries, by the variance of the logits of its parts,
            which count as many keys as they have.

    Returns:
        [B, H, n_q, n_k]; without ``variance`` rows of query blocks with a real query sum to 1, others are 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, _, heads, _), n_q, n_k = q.shape, len(q_rows), len(k_rows)
    q_rows, k_rows = q_rows.reshape(n_q * q_parts, -1), k_rows.reshape(n_k * k_parts, -1)
    queries = _sums(q, q_rows, dtype) / real_counts(q_rows).to(dtype)[:, None]
    keys, log_size = _keys(k, k_rows, key_bias, dtype)
    keys = keys.transpose(-1, -2)
    count = (q_rows >= 0).sum(1).view(n_q, q_parts).to(dtype)
    of_queries = count / count.sum(1, keepdim=True).clamp(min=1)
    of_keys = log_size.unflatten(-1, (n_k, k_parts)).softmax(-1).nan_to_num(nan=0.0)[:, :, None]
    found = []
    step = max(1, _LOGITS // (batch * heads * q_parts * n_k * k_parts))
    for first in range(0, n_q, step):
        some = slice(first, first + step)
        logits = queries[:, :, first * q_parts : (first + step) * q_parts] @ keys * scale
        weight = (logits + log_size[:, :, None]).softmax(-1).unflatten(-1, (n_k, k_parts)).sum(-1)
        if variance:
            by_block = logits.unflatten(-1, (n_k, k_parts))
            mean = (by_block * of_keys).sum(-1, keepdim=True)
            weight = weight * ((by_block - mean).square() * of_keys).sum(-1)
        found.append((weight.unflatten(2, (-1, q_parts)) * of_queries[some, :, None]).sum(3))
    # a row in which no key is seen is 0 / 0
    return torch.cat(found, 2).masked_fill_(~(log_size > -torch.inf).any(-1)[:, :, None, None], 0.0)


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
