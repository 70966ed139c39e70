"""Laid out: queries, keys and values copied into the order of their tiles, where these are not boxes.

A GPU fetches a tile fastest where its rows lie one behind the other. Laid out once, they do so for the attention of
tiles and for attending to proxies; only the output is put back. Means of tiles, which choices and proxies are made of,
come from the same pass over memory. CPU kernels gather as they go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.tiles import Tiles
from visparse_kernels import InOrder, lay_out
from visparse_kernels.boxes import Boxes


@dataclass(frozen=True, kw_only=True, eq=False)
class Laid:
    """A call in the order of its tiles.

    Attributes:
        call: its arguments, in that order.
        rows: what was made of them, with means where they were asked for.
        parts: of a tile of keys, which have a mean key each; 0 without means.
    """

    call: Call
    rows: InOrder
    parts: int

    @property
    def pooled(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of proxies, those of all tiles in their order, [B, n, H, D]; None where none were made."""
        k, v = self.rows.pooled_k, self.rows.pooled_v
        return None if k is None or v is None else (k, v)


@dataclass(frozen=True, kw_only=True, eq=False)
class LaidOut:
    """A sequence in the order of its tiles, without padding.

    Attributes:
        tiles: the same tiles, of that sequence; each is a run of it.
        source: the tiles of the sequence as it came.
        keys: int64 [N], the token in each place of the keys; queries may have another order.
        places: int64 [N], the place of each query.
    """

    tiles: Tiles
    source: Tiles
    keys: Tensor
    places: Tensor

    def lay(self, call: Call, parts: int = 0, pool: int = 0) -> Laid:
        """Copy the arguments of a call into the order of the tiles.

        Args:
            call: of attention.
            parts, pool: means that are wanted, as `visparse_kernels.lay_out` has them. With a bias, which means
                would have to heed, none are made.
        """
        parts, pool = (parts, pool) if call.bias is None else (0, 0)
        tiles = self.source
        rows = lay_out(*call[:3], tiles.q_order, tiles.k_order, tiles.block_q, tiles.block_k, parts=parts, pool=pool)
        bias = None if call.bias is None else call.bias.index_select(2, self.keys)
        return Laid(call=call._replace(q=rows.q, k=rows.k, v=rows.v, bias=bias), rows=rows, parts=parts)

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
        source=tiles,
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
