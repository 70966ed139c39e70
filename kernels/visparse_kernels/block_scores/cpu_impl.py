"""`block_scores` on the CPU: head by head, some query blocks at a time, so that the logits are never all there.

Keys are centred inside their block. Then the sum of squares of the logits is the variance, without cancellation, and
padding needs no mask: a padding slot is the mean key, its weight exp(mean logit) is known, and the block's own keys
weigh at least as much each (Jensen), so taking it off again loses next to nothing.
"""

import torch
from torch import Tensor

from visparse_kernels.block_scores.slots import added_to_logits, gather_lse, gather_rows, real_counts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# logits held at once, in elements: 8 MiB; 1 MiB is as fast, but on a busy machine many small calls wait for threads
_LOGITS = 1 << 21


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, rows_q: int, rows_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if device.type != "cpu":
        return f"needs tensors on the CPU, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs fp32, bf16 or fp16, got {dtype}"
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
    """Compute the scores in fp32; see `reference.run` for the arguments.

    Returns:
        fp32 [B, H, n_q, n_k].
    """
    (batch, _, heads, _), (n_q, w_q), (n_k, w_k) = q.shape, q_rows.shape, k_rows.shape
    added = added_to_logits(key_bias, k_rows, torch.float32).expand(batch, heads, -1, -1)
    tops = gather_lse(lse, q_rows, torch.float32)
    scores = torch.empty(batch, heads, n_q, n_k)
    step = max(1, _LOGITS // (w_q * n_k * w_k))
    for row in range(batch):
        for head in range(heads):
            at = (slice(row, row + 1), slice(None), slice(head, head + 1))
            queries = gather_rows(q[at], q_rows)[0, 0].float() * scale
            keys, bias = gather_rows(k[at], k_rows)[0, 0].float(), added[row, head]
            if key_bias is not None:
                queries = torch.cat([queries, torch.ones_like(queries[:, :1])], 1)
                keys = torch.cat([keys, bias.flatten()[:, None]], 1)
            centred, means, n_seen = _centre(keys.unflatten(0, (n_k, w_k)), bias > -torch.inf)
            mean_logits = queries @ means.T - tops[row, head][:, None]
            for first in range(0, n_q, step):
                part = slice(first * w_q, (first + step) * w_q)
                weight = _weights(queries[part], centred, mean_logits[part], n_seen, w_k, variance)
                scores[row, head, first : first + step] = weight.view(-1, w_q, n_k).sum(1)
    return scores.div_(real_counts(q_rows)[:, None])


def _centre(keys: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the mean off the keys [n_k, w_k, d] of each block, those that are seen; the others become 0.

    Returns:
        ``centred [d, n_k * w_k]``, ``means [n_k, d]`` and the number of seen keys ``[n_k]``.
    """
    n_seen = seen.sum(1).float()
    keys = keys.masked_fill(~seen[..., None], 0.0)
    means = keys.sum(1) / n_seen.clamp(min=1)[:, None]
    centred = (keys - means[:, None]).masked_fill_(~seen[..., None], 0.0)
    return centred.flatten(0, 1).T.contiguous(), means, n_seen


def _weights(queries: Tensor, centred: Tensor, mean_logits: Tensor, n_seen: Tensor, w_k: int, variance: bool) -> Tensor:
    """Return the mass of every block for some queries [r, d], or mass times variance: [r, n_k]."""
    logits = (queries @ centred).unflatten(1, (-1, w_k))
    spread = logits.square().sum(-1) / n_seen.clamp(min=1) if variance else None
    logits += mean_logits[..., None]
    mass = logits.exp_().sum(-1)
    mass -= (w_k - n_seen) * mean_logits.exp()
    mass.masked_fill_(n_seen == 0, 0.0)
    return mass.clamp_(min=0.0) if spread is None else mass.clamp_(min=0.0) * spread
