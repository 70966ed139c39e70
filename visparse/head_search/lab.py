"""Lab: dense attention of a sample of queries, taken apart so that every candidate's output follows from it.

Logits are computed once for each layer and call, and shared by all candidates: what a candidate does not see is left
out of the sums. All of it is in fp32; nothing of size N x N is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.proxy_table import ProxyTable
from visparse.head_search.rows import Rows
from visparse_kernels import pool_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Proxied:
    """The proxies of all tiles, as the sampled queries see them.

    Attributes:
        weight: [H, T, r, P], their share of the softmax of dense attention's keys.
        value: [H, P, D].
        tile: int64 [P], the tile that each stands for.
    """

    weight: Tensor
    value: Tensor
    tile: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Lab:
    """One call's sampled queries; H heads, T tiles of r queries, n_k tiles of keys.

    Attributes:
        rows: the queries.
        weight: [H, T * r, slots], softmax over the keys in slot order; 0 for padding.
        v: [H, slots, D].
        mass: [H, T, n_k, r], share of the softmax of each tile of keys.
        value: [H, T, n_k, r * D], its part of the output.
        variance: [H, T, n_k, r], variance of the logits inside each tile.
        proxied: what proxies would give; None without.
    """

    rows: Rows
    weight: Tensor
    v: Tensor
    mass: Tensor
    value: Tensor
    variance: Tensor
    proxied: Proxied | None

    @property
    def dense(self) -> Tensor:
        """Output of dense attention, [H, T, r, D]."""
        heads, tiles, _, queries = self.mass.shape
        return self.value.sum(2).view(heads, tiles, queries, -1)

    def scores(self, kind: str) -> Tensor:
        """By what a selector chooses tiles: what `block_scores` gives for these tiles, [H, T, n_k].

        Args:
            kind: ``"mass"`` or ``"mass_variance"``.
        """
        score = self.mass if kind == "mass" else self.mass * self.variance
        chooses = self.rows.chooses.float()
        return torch.einsum("htjr,tr->htj", score, chooses) / chooses.sum(1).clamp(min=1)[:, None]

    def exact(self, mask: Tensor) -> Tensor:
        """Output where each query sees the keys of a mask and nothing else.

        Args:
            mask: bool [T * r, slots].

        Returns:
            [H, T, r, D]; 0 for a query that sees nothing.
        """
        kept = self.weight * mask
        out = torch.bmm(kept, self.v) / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return out.view(self.dense.shape)

    def tiled(self, kept: Tensor) -> Tensor:
        """Outputs where each tile of queries sees tiles of keys exactly, and the others by proxy, if there are any.

        Args:
            kept: bool [H, T, C, n_k], of C candidates.

        Returns:
            [C, H, T, r, D].
        """
        heads, tiles, _, queries = self.mass.shape
        count = kept.shape[2]
        exact = kept.float()
        total = torch.matmul(exact, self.mass)
        out = torch.matmul(exact, self.value).view(heads, tiles, count, queries, -1)
        if self.proxied is not None:
            seen = kept.index_select(-1, self.proxied.tile)
            weight = self.proxied.weight[:, :, None] * ~seen[:, :, :, None]  # [H, T, C, r, P]
            total = total + weight.sum(-1)
            flat = torch.matmul(weight.flatten(1, 3), self.proxied.value)
            out = out + flat.view(out.shape)
        tiny = torch.finfo(torch.float32).tiny
        return (out / total.clamp(min=tiny)[..., None]).permute(2, 0, 1, 3, 4)


def make_lab(call: Call, heads: slice, rows: Rows, table: ProxyTable | None) -> Lab:
    """Take dense attention of some heads apart.

    Args:
        call: with one row of the batch.
        heads: which of its heads.
        rows: the queries.
        table: of the proxies; None without.
    """
    tiles = rows.tiles
    order, real = tiles.k_order.long(), tiles.k_order >= 0
    q, k, v = (x[0, :, heads].transpose(0, 1).float() for x in (call.q, call.k, call.v))  # [H, N, D]
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    queries = q[:, rows.tokens.flatten().clamp(min=0)]
    slots = order.clamp(min=0)
    keys, values = k[:, slots], v[:, slots].masked_fill(~real[:, None], 0.0)
    logits = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    hidden = ~real
    if call.bias is not None:
        added = call.bias[0].float()
        added = (added[heads] if len(added) > 1 else added)[:, slots].masked_fill(hidden, -torch.inf)
        logits += added[:, None]
        hidden = added[:, None] == -torch.inf
    logits.masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    count, n_q, n_k, size = len(q), len(rows.blocks), tiles.n_k, v.shape[-1]
    variance = _variance(logits.view(count, -1, n_k, tiles.block_k))
    weight = logits.sub_(lse).exp_()
    by_tile = weight.view(count, -1, n_k, tiles.block_k)
    shape = (count, n_q, -1, n_k)
    value = torch.einsum("hrjb,hjbd->hjrd", by_tile, values.view(count, n_k, tiles.block_k, size))
    proxied = None
    if table is not None:
        bias = call.bias if call.bias is None or call.bias.shape[1] == 1 else call.bias[:, heads]
        pooled_k, pooled_v, log_n = pool_tokens(
            call.k[:, :, heads].float(), call.v[:, :, heads].float(), table.members, key_bias=bias
        )
        seen = torch.bmm(queries, pooled_k[0].permute(1, 2, 0)).mul_(scale).add_(log_n[0][:, None])
        proxied = Proxied(
            weight=seen.sub_(lse).exp_().view(count, n_q, -1, seen.shape[-1]),
            value=pooled_v[0].transpose(0, 1).contiguous(),
            tile=table.tile,
        )
    return Lab(
        rows=rows,
        weight=weight,
        v=values,
        mass=by_tile.sum(-1).view(shape).transpose(2, 3).contiguous(),
        value=value.view(count, n_k, n_q, -1).transpose(1, 2).contiguous(),
        variance=variance.view(shape).transpose(2, 3),
        proxied=proxied,
    )


def _variance(logits: Tensor) -> Tensor:
    """Variance of the logits inside each tile over its real keys; 0 where there are none."""
    real = logits > -torch.inf
    count = real.sum(-1).clamp(min=1)
    safe = logits.masked_fill(~real, 0.0)
    mean = safe.sum(-1) / count
    return ((safe - mean[..., None]).masked_fill_(~real, 0.0) ** 2).sum(-1) / count
