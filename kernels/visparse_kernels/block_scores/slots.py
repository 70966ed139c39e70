"""Tokens in blocks: which queries are sampled, and rows, log-sum-exps and biases laid out by slot."""

import torch
from torch import Tensor


def sampled_rows(q_order: Tensor, block_q: int, sample: int) -> Tensor:
    """Pick every ``sample``-th real query of each block, beginning with the first.

    Ranks count real tokens only, so a block with a real query always has a sample, and a whole block gives every
    ``sample``-th slot.

    Args:
        q_order: int32 [n_q * block_q], slot -> token, -1 padding.
        block_q: query slots per block.
        sample: a divisor of ``block_q``.

    Returns:
        int32 [n_q, block_q / sample], tokens, then -1 where a block has fewer.
    """
    tokens = q_order.view(-1, block_q)
    if sample == 1:
        return tokens
    real = tokens >= 0
    rank = real.cumsum(1) - 1
    # what is not picked goes to one more column, which is cut off
    width = block_q // sample
    place = torch.where(real & (rank % sample == 0), rank // sample, width)
    rows = tokens.new_full((tokens.shape[0], width + 1), -1)
    return rows.scatter_(1, place, tokens)[:, :width].contiguous()


def pad_rows(rows: Tensor, width: int) -> Tensor:
    """Widen a table [n, w] of tokens to [n, width] with -1."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copy the rows of tokens into slot order; padding is 0, whatever lies in memory.

    Args:
        x: [B, S, H, D].
        rows: int32 [n, w], tokens, -1 padding.

    Returns:
        [B, H, n * w, D], contiguous.
    """
    at = rows.flatten()
    copied = x.transpose(1, 2).index_select(2, at.clamp(min=0))
    return copied.masked_fill_((at < 0)[:, None], 0.0)


def gather_lse(lse: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy log-sum-exps into slot order; padding and queries that see nothing get +inf, so that they weigh 0.

    Args:
        lse: [B, H, Sq], natural logarithm.
        rows: int32 [n, w], tokens, -1 padding.
        dtype: of the result.

    Returns:
        [B, H, n * w].
    """
    at = rows.flatten()
    copied = lse.to(dtype).index_select(2, at.clamp(min=0))
    return copied.masked_fill_((at < 0) | (copied == -torch.inf), torch.inf)


def added_to_logits(key_bias: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay a key bias out by slots; -inf hides padding.

    Args:
        key_bias: [B or 1, H or 1, Sk], or None.
        rows: int32 [n, w], tokens, -1 padding.
        dtype: of the result.

    Returns:
        [B or 1, H or 1, n, w]; ``[1, 1, n, w]`` without a bias.
    """
    if key_bias is None:
        return torch.zeros(1, 1, *rows.shape, dtype=dtype, device=rows.device).masked_fill_(rows < 0, -torch.inf)
    copied = key_bias.to(dtype).index_select(2, rows.flatten().clamp(min=0))
    return copied.view(*copied.shape[:2], *rows.shape).masked_fill_(rows < 0, -torch.inf)


def real_counts(rows: Tensor) -> Tensor:
    """Return how many tokens each row of a table holds, fp32 [n], at least 1, to divide by."""
    return (rows >= 0).sum(1).clamp(min=1).float()
