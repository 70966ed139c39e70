"""Which tokens the proxies of a layout stand for, which of them a block of queries does not see, and their making."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.config import Proxies
from visparse.compensation.tiles import Tiles
from visparse_kernels import pool_tokens
from visparse_kernels.bits import pack_bits
from visparse_kernels.proxies.hidden import hidden_proxies


@dataclass(frozen=True, kw_only=True, eq=False)
class ProxyTable:
    """The proxies of a layout.

    Attributes:
        members: int32 [P, m], tokens of each proxy; -1 is padding. Every proxy has at least one.
        counts: fp32 [P], tokens that it stands for.
        tile: int64 [P], its tile of keys.
        parent: int64 [tiles], neighbourhood of eight tiles that a tile lies in; None with one level.
        parents: number of those neighbourhoods; 0 with one level.
    """

    members: Tensor
    counts: Tensor
    tile: Tensor
    parent: Tensor | None
    parents: int

    @cached_property
    def log_counts(self) -> Tensor:
        """Weights of the proxies without a bias, fp32 [1, 1, P]."""
        return self.counts.log()[None, None]

    def hidden(self, kept: Tensor) -> Tensor:
        """Return which proxies a block of queries does not attend to.

        Args:
            kept: bool [..., n_q, n_k], tiles (and blocks of extra tokens) that are seen exactly.

        Returns:
            int32 [..., n_q, words]: bit p % 32 of word p // 32 belongs to proxy p; those of parents come last.
        """
        if self.parent is None:
            return hidden_proxies(kept, self.tile)
        own = kept[..., : len(self.parent)]
        touched = own.new_zeros(*own.shape[:-1], self.parents, dtype=torch.int32)
        touched.index_add_(-1, self.parent, own.to(torch.int32))
        touched = touched > 0
        shared = ~touched.index_select(-1, self.parent[self.tile])
        seen = torch.cat([kept.index_select(-1, self.tile) | shared, touched], -1)
        return pack_bits(torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 32), value=True))


@lru_cache(maxsize=16)
def proxy_table(tiles: Tiles, proxies: Proxies) -> ProxyTable:
    """Return the proxies of the tiles of a layout; the last 16 results are cached.

    Args:
        tiles: of the layout.
        proxies: how many, and of which kind.

    Raises:
        ValueError: a tile has fewer tokens than proxies.
    """
    if proxies.per_tile > tiles.block_k:
        raise ValueError(f"per_tile: wanted at most the {tiles.block_k} tokens of a tile, got {proxies.per_tile}")
    keys = tiles.keys
    parts = tiles.parts(proxies.per_tile)
    members = keys[:, parts.argsort(stable=True)].view(len(keys) * proxies.per_tile, -1)
    tile = torch.arange(len(members), device=keys.device) // proxies.per_tile
    counts = (members >= 0).sum(1)
    alive = counts > 0
    members, tile, counts = members[alive], tile[alive], counts[alive]
    if proxies.kind == "sample":
        real_first = members.sort(1, descending=True).values.flip(1)  # ascending, padding in front
        middle = members.shape[1] - counts + (counts - 1) // 2
        members = real_first.gather(1, middle[:, None]).contiguous()
    parent, parents = (tiles.parents(), 0) if proxies.levels == 2 else (None, 0)
    if parent is not None:
        parents = int(parent.max()) + 1
    return ProxyTable(members=members, counts=counts.float(), tile=tile, parent=parent, parents=parents)


def pool(
    call: Call, table: ProxyTable, kind: str, means: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and weights of the proxies, those of neighbourhoods of tiles last.

    Args:
        call: of attention.
        table: of the layout's proxies.
        kind: of the proxies.
        means: keys and values of the proxies of tiles in the order of ``table.members``, where they are known already
            and there is no bias; more may follow behind the last one.

    Returns:
        What `visparse_kernels.pool_tokens` gives.
    """
    if means is not None:
        k, v = (x[:, : len(table.counts)] for x in means)
        weight = table.log_counts
    else:
        k, v, weight = pool_tokens(
            call.k,
            call.v,
            table.members,
            key_bias=call.bias,
            query=call.q if kind == "agent" else None,
            counts=table.counts if kind == "sample" else None,
            scale=call.scale,
        )
    if table.parent is None:
        return k, v, weight
    parent = table.parent[table.tile]
    share = weight.float().exp()
    total = share.new_zeros(*share.shape[:-1], table.parents).index_add_(-1, parent, share)
    part = (share / total.index_select(-1, parent).clamp(min=1e-30)).transpose(1, 2).unsqueeze(-1)
    wide = []
    for x in (k, v):
        mean = torch.zeros(x.shape[0], table.parents, *x.shape[2:], dtype=torch.float32, device=x.device)
        wide.append(torch.cat([x, mean.index_add_(1, parent, x.float() * part).to(x.dtype)], 1))
    return wide[0], wide[1], torch.cat([weight, total.log()], -1)
