"""What a proxy is made of: the share of each token in its proxy, the weight of the proxy, and weighted means."""

from functools import lru_cache

import torch
from torch import Tensor

from visparse_kernels.same import Same

_SCRATCH = 1 << 25  # gathered elements held at once


def bias_of(members: Tensor, key_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logit of each member, [B or 1, H or 1, P, m]; -inf for padding.

    Args:
        members: int32 [P, m], -1 padding.
        key_bias: [B or 1, H or 1, N], or None.
        dtype: of the result.
    """
    if key_bias is None:
        key_bias = members.new_zeros((1, 1, 1), dtype=dtype)
        bias = key_bias[..., None].expand(1, 1, *members.shape)
    else:
        bias = key_bias.to(dtype)[:, :, members.clamp(min=0).long()]
    return bias.masked_fill(members < 0, -torch.inf)


def weights_of(members: Tensor, bias: Tensor, counts: Tensor | None) -> Tensor:
    """Return the logarithm of the number of tokens that each proxy stands for, [B or 1, H or 1, P].

    Args:
        members: int32 [P, m], -1 padding.
        bias: what `bias_of` returns.
        counts: [P], how many tokens each proxy stands for; None for the number of its members.
    """
    weight = bias.logsumexp(-1)
    if counts is None:
        return weight
    return weight + (counts.to(weight.dtype).log() - (members >= 0).sum(1).to(weight.dtype).log())


def plain_weights(members: Tensor, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `weights_of` without a bias, [1, 1, P]; found once for each table of members, so do not change one.

    Args:
        members: int32 [P, m], -1 padding.
        counts: as in `weights_of`.
        dtype: of the result.
    """
    return _plain_weights(Same(members), None if counts is None else Same(counts), dtype).clone()


@lru_cache(maxsize=16)
def _plain_weights(members: Same, counts: Same | None, dtype: torch.dtype) -> Tensor:
    bias = bias_of(members.tensor, None, dtype)
    return weights_of(members.tensor, bias, None if counts is None else counts.tensor)


def shares_of(logits: Tensor) -> Tensor:
    """Return the softmax over the last axis; 0 where all of it is -inf."""
    return logits.softmax(-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)


def agent_logits(k: Tensor, query: Tensor, members: Tensor, shares: Tensor, scale: float) -> Tensor:
    """Return the scaled products of each member's key with the mean query of its tile, [B, H, P, m].

    Args:
        k: [B, N, H, D].
        query: [B, N, H, D].
        members: int32 [P, m], -1 padding.
        shares: [B or 1, H or 1, P, m], weights of the mean query.
        scale: factor of the products.
    """
    agents = weighted_means(query, members, shares)
    steps = _steps(k, members)
    parts = [
        (_gather(k, part, share, shares.dtype) * agent[:, :, None]).sum(-1).permute(0, 3, 1, 2)
        for part, share, agent in zip(members.split(steps), shares.split(steps, 2), agents.split(steps, 1), strict=True)
    ]
    return torch.cat(parts, 2) * scale


def weighted_means(x: Tensor, members: Tensor, shares: Tensor) -> Tensor:
    """Return the weighted mean of the rows of each proxy; a row of share 0 is not looked at.

    Args:
        x: [B, N, H, D].
        members: int32 [P, m], -1 padding.
        shares: [B or 1, H or 1, P, m], which also gives the dtype of the computation.

    Returns:
        [B, P, H, D], dtype of ``shares``.
    """
    steps = _steps(x, members)
    parts = [
        (_gather(x, part, share, shares.dtype) * share.permute(0, 2, 3, 1)[..., None]).sum(2)
        for part, share in zip(members.split(steps), shares.split(steps, 2), strict=True)
    ]
    return torch.cat(parts, 1)


def _steps(x: Tensor, members: Tensor) -> int:
    batch, _, heads, dim = x.shape
    return max(1, _SCRATCH // (batch * heads * dim * members.shape[1]))


def _gather(x: Tensor, members: Tensor, shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows to [B, p, m, H, D]; those of share 0 become 0, whatever they hold."""
    rows = x[:, members.clamp(min=0).long()].to(dtype)
    return rows.masked_fill((shares == 0).permute(0, 2, 3, 1)[..., None], 0.0)
