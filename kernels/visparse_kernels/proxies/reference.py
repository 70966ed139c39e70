"""The definitions of `pool_tokens` and `attend_proxies`, computed plainly; fp64 for fp64 inputs."""

import torch
from torch import Tensor

from visparse_kernels.bits import unpack_bits
from visparse_kernels.lists_views import order_of
from visparse_kernels.proxies.means import weighted_means

_SCRATCH = 1 << 25  # logits held at once


def cannot_pool(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this implementation cannot pool a case, or None: it serves every case."""
    return None


def cannot_attend(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> str | None:
    """Return why this implementation cannot serve a case, or None: it serves every case."""
    return None


def pool(k: Tensor, v: Tensor, members: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted means of the keys and of the values of each proxy.

    Args:
        k: [B, N, H, D].
        v: [B, N, H, D].
        members: int32 [P, m], tokens of each proxy, -1 padding.
        shares: [B or 1, H or 1, P, m], weights that sum to 1 or are all 0; None weighs the members alike.

    Returns:
        Two tensors [B, P, H, D], dtype of k.
    """
    if shares is None:
        real = members >= 0
        shares = real.to(torch.promote_types(k.dtype, torch.float32)) / real.sum(1, keepdim=True).clamp(min=1)
        shares = shares[None, None]
    return weighted_means(k, members, shares).to(k.dtype), weighted_means(v, members, shares).to(v.dtype)


def attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the proxies and to one more key: its logit is ``lse``, its value ``out``.

    See `visparse_kernels.proxies.api.attend_proxies` for the arguments.
    """
    batch, _, heads, _ = q.shape
    dtype, n_proxies = lse.dtype, pooled_k.shape[1]
    new_out, new_lse = (x.clone(memory_format=torch.contiguous_format) for x in (out, lse))
    added = weight.to(dtype).expand(batch, heads, -1)
    step = max(1, _SCRATCH // (batch * heads * block_q * n_proxies))
    for group in range(hidden.shape[1]):
        members = (head_group == group).nonzero()[:, 0]
        keys, values = (x[:, :, members].transpose(1, 2).to(dtype) for x in (pooled_k, pooled_v))
        blocks = order_of(q_order, group).view(-1, block_q)
        for first in range(0, blocks.shape[0], step):
            tokens = blocks[first : first + step]
            gone = unpack_bits(hidden[:, group, first : first + step])[..., :n_proxies]
            gone = gone[:, :, None].expand(-1, -1, block_q, -1).flatten(1, 2)
            real = tokens.flatten() >= 0
            at = (slice(None), tokens.flatten()[real].long()[:, None], members[None, :])
            logits = q[at].transpose(1, 2).to(dtype) @ keys.transpose(-1, -2) * scale + added[:, members, None]
            logits = logits.masked_fill(gone[:, None, real], -torch.inf)
            known = lse[:, members[:, None], tokens.flatten()[real].long()[None, :]]
            total = torch.logaddexp(logits.logsumexp(-1), known)
            base = torch.where(total == -torch.inf, 0.0, total)[..., None]
            merged = (logits - base).exp() @ values + (known[..., None] - base).exp() * out[at].transpose(1, 2).to(
                dtype
            )
            new_out[at] = merged.transpose(1, 2).to(out.dtype)
            new_lse[:, members[:, None], tokens.flatten()[real].long()[None, :]] = total
    return new_out, new_lse


def put_in_order(out: Tensor, lse: Tensor, q_order: Tensor, out_order: Tensor) -> tuple[Tensor, Tensor]:
    """Move what belongs to the query in each slot to another place.

    Args:
        out: [B, Sq, H, D].
        lse: [B, H, Sq].
        q_order: int32 [1, slots], slot -> query, -1 padding.
        out_order: int32 [1, slots], slot -> place in the result.
    """
    real = q_order[0] >= 0
    queries = torch.empty_like(q_order[0][real], dtype=torch.int64)
    queries[out_order[0][real].long()] = q_order[0][real].long()
    return out.index_select(1, queries), lse.index_select(2, queries)
