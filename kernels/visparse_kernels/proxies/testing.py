"""Oracles of proxy tokens, random cases and broken variants: what the tests of every implementation share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits, unpack_bits
from visparse_kernels.testing import check_close


@dataclass(frozen=True)
class ProxyCase:
    """Arguments of `attend_proxies`, under its names."""

    q: Tensor
    out: Tensor
    lse: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    weight: Tensor
    hidden: Tensor
    head_group: Tensor
    q_order: Tensor
    block_q: int

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Return the arguments in their order."""
        tables = (self.hidden, self.head_group, self.q_order, self.block_q)
        return (self.q, self.out, self.lse, self.pooled_k, self.pooled_v, self.weight, *tables)

    def shown(self) -> Tensor:
        """Return which proxies each query sees, bool [B or 1, H, Sq, P]; query by query, no block at a time."""
        length, n_proxies = self.q.shape[1], self.pooled_k.shape[1]
        bits = ~unpack_bits(self.hidden)[..., :n_proxies]
        shown = torch.zeros(bits.shape[0], self.q.shape[2], length, n_proxies, dtype=torch.bool, device=bits.device)
        for head, group in enumerate(self.head_group.tolist()):
            order = self.q_order[group if self.q_order.shape[0] > 1 else 0].tolist()
            for slot, token in enumerate(order):
                if group >= 0 and token >= 0:
                    shown[:, head, token] = bits[:, group, slot // self.block_q]
        return shown


def random_case(
    *,
    length: int,
    n_proxies: int,
    block_q: int,
    head_group: list[int],
    batch: int = 1,
    head_dim: int = 64,
    hide: float = 0.3,
    shuffled: bool = False,
    per_batch: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ProxyCase:
    """Draw a case: some proxies of weight -inf, some queries that saw nothing, some blocks that hide all proxies.

    Args:
        length: number of queries.
        n_proxies: number of proxies.
        block_q: query slots per block.
        head_group: group of each head, -1 for a skipped head.
        batch: batch rows.
        head_dim: size of a head.
        hide: share of hidden proxies.
        shuffled: give every group an order of its own, with padding anywhere.
        per_batch: give every batch row, and every head, tables and weights of its own.
        dtype: of q.
        device: where the case lives.
        seed: of the generator.
    """
    make = torch.Generator().manual_seed(seed)
    heads, groups = len(head_group), max(0, *head_group) + 1
    n_q = -(-length // block_q) + (1 if shuffled else 0)
    rows = batch if per_batch else 1
    gone = torch.rand(rows, groups, n_q, -(-n_proxies // 32) * 32, generator=make) < hide
    gone[:, 0, 0] = True
    gone[..., n_proxies:] = torch.rand(gone[..., n_proxies:].shape, generator=make) < 0.5
    slots = [torch.randperm(n_q * block_q, generator=make) for _ in range(groups)]
    order = torch.stack(slots) if shuffled else torch.arange(n_q * block_q)[None]
    weight = torch.rand(rows, heads if per_batch else 1, n_proxies, generator=make) * 3
    weight[..., 1::7] = -torch.inf
    lse = torch.randn(batch, heads, length, generator=make) + 2
    lse[..., ::5] = -torch.inf
    out = torch.randn(batch, length, heads, head_dim, generator=make)
    out = out.masked_fill(lse.transpose(1, 2)[..., None] == -torch.inf, 0.0)
    q = torch.randn(batch, length, heads, head_dim, generator=make)
    k, v = torch.randn(2, batch, n_proxies, heads, head_dim, generator=make)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ProxyCase(
        q=q.to(device, dtype),
        out=out.to(device, dtype),
        lse=lse.to(device, wide),
        pooled_k=k.to(device, dtype),
        pooled_v=v.to(device, dtype),
        weight=weight.to(device, wide),
        hidden=pack_bits(gone).to(device),
        head_group=torch.tensor(head_group, dtype=torch.int32, device=device),
        q_order=torch.where(order < length, order, -1).to(device, torch.int32),
        block_q=block_q,
    )


def plain_proxies(case: ProxyCase, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute `attend_proxies` as plain PyTorch would: two softmaxes over dense logits, then their merge.

    Args:
        case: the arguments.
        scale: factor of the logits.
        dtype: of the computation: fp64 for the truth, the dtype of q for what eager PyTorch does.

    Returns:
        ``out [B, Sq, H, D]`` and ``lse [B, H, Sq]``, both in ``dtype``.
    """
    q, k, v, out = (x.to(dtype).transpose(1, 2) for x in (case.q, case.pooled_k, case.pooled_v, case.out))
    logits = q @ k.transpose(-1, -2) * scale + case.weight.to(dtype)[:, :, None]
    logits = logits.masked_fill(~case.shown(), -torch.inf)
    seen = logits.logsumexp(-1)
    known = case.lse.to(dtype)
    total = torch.logaddexp(known, seen)
    share = (seen - total).exp().nan_to_num(nan=0.0)[..., None]
    kept = (known - total).exp().nan_to_num(nan=0.0)[..., None]
    merged = logits.softmax(-1).nan_to_num(nan=0.0) @ v * share + out * kept
    return merged.transpose(1, 2), total


def check_proxies(out: Tensor, lse: Tensor, case: ProxyCase, scale: float | None = None) -> None:
    """Raise where a result of `attend_proxies` breaks the error rule, on the output or on the log-sum-exp.

    Args:
        out: [B, Sq, H, D], the output to judge.
        lse: [B, H, Sq], its log-sum-exp.
        case: the arguments.
        scale: as given to `attend_proxies`.

    Raises:
        AssertionError: names the worst index and both errors.
    """
    scale = case.q.shape[-1] ** -0.5 if scale is None else scale
    wanted, wanted_lse = plain_proxies(case, scale, torch.float64)
    plain, plain_lse = plain_proxies(case, scale, case.q.dtype)
    check_close("out [b, s, h, d]", out, wanted, plain, case.q.dtype)
    check_close("lse [b, h, s]", lse, wanted_lse, plain_lse, case.q.dtype)


def plain_means(
    x: Tensor, members: Tensor, key_bias: Tensor | None, query: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the mean and the weight of every proxy, one proxy and head at a time.

    Args:
        x: [2, B, N, H, D], keys and values.
        members: int32 [P, m], -1 padding.
        key_bias: [B or 1, H or 1, N], or None.
        query: [B, N, H, D], or None.
        scale: factor of the agents' logits.
        dtype: of the computation: fp64 for the truth, fp32 for what eager PyTorch does.

    Returns:
        Means [2, B, P, H, D] and weights [B, H, P], both in ``dtype``.
    """
    _, batch, length, heads, dim = x.shape
    rows = x.to(dtype)
    bias = torch.zeros(batch, heads, length, dtype=dtype, device=x.device)
    bias = bias if key_bias is None else key_bias.to(dtype).expand(batch, heads, length)
    means = rows.new_zeros(2, batch, members.shape[0], heads, dim)
    weights = rows.new_full((batch, heads, members.shape[0]), -torch.inf)
    for b in range(batch):
        for h in range(heads):
            for p, row in enumerate(members.tolist()):
                tokens = [t for t in row if t >= 0 and float(bias[b, h, t]) > -torch.inf]
                if not tokens:
                    continue
                portion = bias[b, h, tokens].exp()
                weights[b, h, p] = portion.sum().log()
                if query is not None:
                    agent = portion @ query[b, tokens, h].to(dtype) / portion.sum()
                    portion = portion * (rows[0, b, tokens, h] @ agent * scale).exp()
                means[:, b, p, h] = torch.einsum("t,xtd->xd", portion / portion.sum(), rows[:, b, tokens, h])
    return means, weights


def ignore_hidden(case: ProxyCase) -> ProxyCase:
    """Break a kernel: the first proxy of every word is seen by all."""
    return replace(case, hidden=case.hidden & -2)


def shift_hidden(case: ProxyCase) -> ProxyCase:
    """Break a kernel: bits are read of the neighbouring query block."""
    return replace(case, hidden=case.hidden.roll(1, 2))


def forget_weight(case: ProxyCase) -> ProxyCase:
    """Break a kernel: a proxy counts as one token."""
    return replace(case, weight=torch.where(case.weight == -torch.inf, case.weight, 0.0))


def forget_exact(case: ProxyCase) -> ProxyCase:
    """Break a kernel: what was seen exactly is not merged."""
    return replace(case, lse=torch.full_like(case.lse, -torch.inf))


# each makes the arguments with which a right kernel computes what a wrong one would
BROKEN: dict[str, Callable[[ProxyCase], ProxyCase]] = {
    "ignore_hidden": ignore_hidden,
    "shift_hidden": shift_hidden,
    "forget_weight": forget_weight,
    "forget_exact": forget_exact,
}
