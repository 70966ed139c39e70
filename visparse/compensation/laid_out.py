"""Laid out: queries, keys and values copied into the order of their tiles, where these are not boxes.

A GPU fetches a tile fastest where its rows lie one behind the other. Laid out once, they do so for the attention of
tiles, for making proxies, and for attending to them; only the output is put back. CPU kernels gather as they go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.tiles import Tiles
from visparse_kernels.boxes import Boxes


@dataclass(frozen=True, kw_only=True, eq=False)
class LaidOut:
    """A sequence in the order of its tiles, without padding.

    Attributes:
        tiles: the same tiles, of that sequence; each is a run of it.
        queries: int64 [N], the token in each place of the queries.
        keys: int64 [N], the same for keys; its order may differ.
        places: int64 [N], the place of each query.
    """

    tiles: Tiles
    queries: Tensor
    keys: Tensor
    places: Tensor

    def lay(self, call: Call) -> Call:
        """Copy the arguments of a call into the order of the tiles."""
        return call._replace(
            q=call.q.index_select(1, self.queries),
            k=call.k.index_select(1, self.keys),
            v=call.v.index_select(1, self.keys),
            bias=None if call.bias is None else call.bias.index_select(2, self.keys),
        )

    def put_back(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Copy output [B, N, H, D] and log-sum-exp [B, H, N] into the order of the tokens."""
        return out.index_select(1, self.places), lse.index_select(2, self.places)


@lru_cache(maxsize=16)
def laid_out(tiles: Tiles) -> LaidOut:
    """Return the sequence in the order of some tiles; the last 16 results are cached.

    Args:
        tiles: of a layout.
    """
    (queries, q_order), (keys, k_order) = _in_order(tiles.q_order), _in_order(tiles.k_order)
    boxes = Boxes(
        grid=(1, 1, tiles.layout.tokens),
        first=0,
        q_box=(None,),
        k_box=(None,),
        q_starts=_runs(q_order, tiles.block_q),
        k_starts=_runs(k_order, tiles.block_k),
    )
    return LaidOut(
        tiles=replace(tiles, q_order=q_order, k_order=k_order, boxes=boxes),
        queries=queries,
        keys=keys,
        places=queries.argsort(),
    )


def pays(tiles: Tiles) -> bool:
    """Whether tensors had better be laid out in the order of some tiles."""
    return tiles.boxes is None and tiles.q_order.device.type == "cuda"


def _in_order(order: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of an order table without its padding, int64, and the table of a sequence that has this order."""
    real = order >= 0
    return order[real].long(), torch.where(real, real.cumsum(0) - 1, -1).to(torch.int32)


def _runs(order: Tensor, block: int) -> Tensor:
    """Where the blocks of runs start, as `Boxes` has it, int32 [1, blocks, 3]."""
    first = order.view(-1, block)[:, 0]
    return torch.stack([torch.full_like(first, -1), torch.zeros_like(first), first], 1)[None]
