"""One layer's attention, dense and with some tiles seen exactly, through the operators that ship."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from visparse.compensation import Proxies
from visparse.compensation.choice import choose_tiles
from visparse.compensation.proxy_table import ProxyTable, proxy_table
from visparse.compensation.state import apply_rho, rho_of
from visparse.compensation.tiles import Tiles, tiles_for
from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import Dense, TopK
from visparse_kernels import BlockLists, attend, attend_proxies, pool_tokens, preferred_blocks

CPU = torch.device("cpu")
TILE = 64  # tokens of a tile of queries and of one of keys: 8 x 8 on a picture


def tiles_of(grid: Grid) -> Tiles:
    """Cut a grid with a class token in front into tiles; all queries see the class token, and it sees all keys."""
    return tiles_for(Layout(grid, before=1), TILE, TILE, CPU)


@dataclass(frozen=True, eq=False)
class Layer:
    """What attention gets in one layer.

    Attributes:
        tiles: of its tokens.
        q, k, v: fp32 [1, N, H, 64].
    """

    tiles: Tiles
    q: Tensor
    k: Tensor
    v: Tensor

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Output of dense attention, [1, N, H, 64], and its log-sum-exp, [1, H, N]."""
        block_q, block_k = preferred_blocks(CPU, self.q.shape[3], self.q.dtype)
        lists = compile_lists(
            (Dense(),) * self.heads,
            Layout((1, 1, self.q.shape[1])),
            block_q=block_q,
            block_k=block_k,
            order="row-major",
            device=CPU,
        )
        out, lse = attend(self.q, self.k, self.v, lists, return_lse=True)
        return out, lse

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.q.shape[2]

    def errors(self, out: Tensor) -> Tensor:
        """Return squared norms for each head, [2, H]: of the difference to dense attention, and of dense attention."""
        dense = self.dense[0]
        return torch.stack([(out - dense).square().sum((0, 1, 3)), dense.square().sum((0, 1, 3))])


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer gives that sees some tiles exactly and drops the others.

    Attributes:
        layer: the layer.
        kept: bool [1, H, tiles, tiles].
        lists: the same as block lists, the class token included.
        out, lse: as `Layer.dense`.
    """

    layer: Layer
    kept: Tensor
    lists: BlockLists
    out: Tensor
    lse: Tensor

    @classmethod
    def run(cls, layer: Layer, kept: Tensor) -> Seen:
        """Attend to tiles.

        Args:
            layer: the layer.
            kept: bool [1, H, tiles, tiles].
        """
        patterns = (TopK(share=1.0),) * layer.heads  # room in the lists for any number of tiles
        lists = choose_tiles(layer.tiles, patterns, kept, {}, None).lists
        return cls(layer, kept, lists, *attend(layer.q, layer.k, layer.v, lists, return_lse=True))

    def scaled(self) -> Tensor:
        """Return the output times the share of the denominator that was seen (Re-ttention's ratio, no residual)."""
        log_rho = rho_of(self.lse, self.layer.dense[1]).to(torch.float16)  # as it is kept between steps
        return apply_rho(self.out, log_rho)

    def with_proxies(self, proxies: Proxies) -> Tensor:
        """Return the output with proxies for the tiles that were dropped."""
        table = proxy_table(self.layer.tiles, proxies)
        out, _ = attend_proxies(
            self.layer.q,
            self.out,
            self.lse,
            *pool(self.layer, proxies, table),
            table.hidden(self.layer.tiles.with_extra(self.kept)),
            self.lists.head_group,
            self.lists.q_order,
            self.lists.block_q,
        )
        return out


def pool(layer: Layer, proxies: Proxies, table: ProxyTable) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values [1, P, H, 64] and weights [1, 1, P] of proxies, those of boxes of tiles last."""
    pooled = pool_tokens(
        layer.k,
        layer.v,
        table.members,
        query=layer.q if proxies.kind == "agent" else None,
        counts=table.counts if proxies.kind == "sample" else None,
    )
    if table.parent is None:
        return pooled
    boxes = [layer.tiles.keys[table.parent == box].flatten() for box in range(table.parents)]
    members = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=-1)
    wide = pool_tokens(layer.k, layer.v, members)
    return (
        torch.cat([pooled[0], wide[0]], 1),
        torch.cat([pooled[1], wide[1]], 1),
        torch.cat([pooled[2], wide[2]], 2),
    )
