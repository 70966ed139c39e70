"""Block lists: which key blocks every query block visits, for all heads of a layer."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse_kernels.bits import identity_order, unpack_bits
from visparse_kernels.boxes import Boxes
from visparse_kernels.lists_build import entries_from_mask, entries_to_csr
from visparse_kernels.lists_check import check_contents, check_shapes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLists:
    """Which key blocks each query block visits; one object serves all heads of a layer.

    A *slot* is a row of the kernel's view of the sequence; an order table says which token lies in it. A *block* is
    ``block_q`` or ``block_k`` consecutive slots. Heads that share a pattern share a *group* and so its lists. A block
    in the full list keeps every pair of real tokens in it; a block in the partial list keeps the pairs whose bit is
    set in its tile. Bits of padding slots mean nothing. No block may be in both lists. G groups, H heads.

    Args:
        q_len: number of query tokens.
        k_len: number of key tokens.
        block_q: query slots per block.
        block_k: key slots per block, a multiple of 32.
        head_group: int32 [H], group of each head, or -1 for a skipped head (output 0, log-sum-exp -inf).
        q_order: int32 [G or 1, n_q * block_q], slot -> token, -1 is padding; every token in exactly one slot.
        k_order: int32 [G or 1, n_k * block_k], the same for keys; with ``boxes`` a key may lie in several slots, or
            in none, but no query keeps it twice.
        full_offsets: int32 [G * n_q + 1], CSR offsets; row = group * n_q + query block.
        full_indices: int32 [n_full or more], key blocks without a mask, ascending in each row; what lies behind the
            last offset means nothing.
        partial_offsets: int32 [G * n_q + 1], CSR offsets of the masked blocks.
        partial_indices: int32 [n_partial], key blocks with a mask, ascending in each row.
        partial_tiles: int32 [n_partial], which tile masks the block.
        tiles: int32 [n_tiles, block_q, block_k / 32], distinct bit masks; bit j of word w is key slot 32 * w + j.
        boxes: where in a grid the blocks lie, if they do; the order tables hold with and without it.

    Raises:
        ValueError: a shape does not fit the others (contents are checked by `validate`).
        TypeError: a table is not an int32 tensor.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    head_group: Tensor
    q_order: Tensor
    k_order: Tensor
    full_offsets: Tensor
    full_indices: Tensor
    partial_offsets: Tensor
    partial_indices: Tensor
    partial_tiles: Tensor
    tiles: Tensor
    boxes: Boxes | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes; cheap, reads no tensor contents."""
        check_shapes(self)

    @classmethod
    def from_entries(
        cls,
        *,
        q_len: int,
        k_len: int,
        block_q: int,
        block_k: int,
        head_group: Tensor,
        q_order: Tensor | None,
        k_order: Tensor | None,
        rows: Tensor,
        cols: Tensor,
        tile: Tensor,
        tiles: Tensor | None = None,
        boxes: Boxes | None = None,
    ) -> "BlockLists":
        """Build lists from visited blocks in any order; never holds a token mask.

        Args:
            q_len: number of query tokens.
            k_len: number of key tokens.
            block_q: query slots per block.
            block_k: key slots per block, a multiple of 32.
            head_group: int [H], group of each head, -1 for a skipped head.
            q_order: int [n_slots] or [G or 1, n_slots], slot -> token, -1 padding; None keeps the token order.
            k_order: the same for keys.
            rows: int [n], group * n_q + query block of each visited block.
            cols: int [n], its key block.
            tile: int [n], its row in ``tiles``, or -1 for a full block.
            tiles: int32 [n_tiles, block_q, block_k / 32]; None where every block is full.
            boxes: where in a grid the blocks lie, if they do.

        Returns:
            The lists, on the device of ``rows``.

        Raises:
            ValueError: an index is out of range, or a block is given twice.
        """
        device = rows.device
        q_order = _order(q_order, q_len, block_q, device)
        k_order = _order(k_order, k_len, block_k, device)
        head_group = head_group.to(device=device, dtype=torch.int32)
        groups = int(head_group.max()) + 1 if head_group.numel() else 0
        if tiles is None:
            tiles = torch.zeros(0, block_q, block_k // 32, dtype=torch.int32, device=device)
        full_offsets, full_indices, partial_offsets, partial_indices, partial_tiles = entries_to_csr(
            rows, cols, tile, groups * (q_order.shape[1] // block_q), k_order.shape[1] // block_k, tiles.shape[0]
        )
        return cls(
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            head_group=head_group,
            q_order=q_order,
            k_order=k_order,
            full_offsets=full_offsets,
            full_indices=full_indices,
            partial_offsets=partial_offsets,
            partial_indices=partial_indices,
            partial_tiles=partial_tiles,
            tiles=tiles.to(device),
            boxes=None if boxes is None else boxes.to(device),
        )

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block_q: int,
        block_k: int,
        *,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
    ) -> "BlockLists":
        """Build lists from a whole token mask; for small sizes and tests.

        Equal heads share a group, a head that keeps nothing is skipped, and equal tiles are stored once.

        Args:
            mask: bool [H, q_len, k_len], in token order.
            block_q: query slots per block.
            block_k: key slots per block, a multiple of 32.
            q_order: int [n_slots] or [1, n_slots], slot -> token, -1 padding; None keeps the token order.
            k_order: the same for keys.

        Returns:
            The lists, on the device of ``mask``.

        Raises:
            ValueError: ``mask`` is not bool with three axes.
        """
        if mask.dtype != torch.bool or mask.ndim != 3:
            raise ValueError(
                f"mask: wanted bool [heads, q_len, k_len], got {mask.dtype} {list(mask.shape)}; "
                "convert it with mask.bool() and add a head axis"
            )
        q_len, k_len = mask.shape[1:]
        q_order = _order(q_order, q_len, block_q, mask.device)
        k_order = _order(k_order, k_len, block_k, mask.device)
        head_group, rows, cols, tile, tiles = entries_from_mask(mask, q_order[0], k_order[0], block_q, block_k)
        return cls.from_entries(
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            head_group=head_group,
            q_order=q_order,
            k_order=k_order,
            rows=rows,
            cols=cols,
            tile=tile,
            tiles=tiles,
        )

    @classmethod
    def dense(
        cls,
        *,
        q_len: int,
        k_len: int,
        heads: int,
        block_q: int,
        block_k: int,
        device: torch.device | str | None = None,
    ) -> "BlockLists":
        """Return lists that keep every pair.

        Args:
            q_len: number of query tokens.
            k_len: number of key tokens.
            heads: number of heads, all in one group.
            block_q: query slots per block.
            block_k: key slots per block, a multiple of 32.
            device: where the tables live.
        """
        n_q, n_k = -(-q_len // block_q), -(-k_len // block_k)
        rows = torch.arange(n_q, device=device).repeat_interleave(n_k)
        cols = torch.arange(n_k, device=device).repeat(n_q)
        return cls.from_entries(
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            head_group=torch.zeros(heads, dtype=torch.int32, device=device),
            q_order=None,
            k_order=None,
            rows=rows,
            cols=cols,
            tile=torch.full_like(rows, -1),
        )

    @property
    def n_q(self) -> int:
        """Query blocks."""
        return self.q_order.shape[1] // self.block_q

    @property
    def n_k(self) -> int:
        """Key blocks."""
        return self.k_order.shape[1] // self.block_k

    @property
    def heads(self) -> int:
        """Heads, skipped ones included."""
        return self.head_group.shape[0]

    @property
    def groups(self) -> int:
        """Groups of heads."""
        return (self.full_offsets.shape[0] - 1) // self.n_q

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return self.full_offsets.device

    @cached_property
    def block_density_per_head(self) -> Tensor:
        """Visited blocks / all blocks of each head, fp64 [H] on the CPU; 0 for a skipped head.

        Boxes hang over the grid, overlap and leave tokens out, so with ``boxes`` all blocks are those of runs.
        """
        visited = (self.full_offsets.diff() + self.partial_offsets.diff()).view(self.groups, self.n_q).sum(1)
        if self.boxes is None:
            blocks = self.n_q * self.n_k
        else:
            blocks = self.boxes.runs(self.q_len, self.block_q) * self.boxes.runs(self.k_len, self.block_k)
        return self._per_head(visited.double() / blocks)

    @cached_property
    def density_per_head(self) -> Tensor:
        """Kept pairs of tokens / all pairs of each head, fp64 [H] on the CPU; 0 for a skipped head."""
        from visparse_kernels.lists_views import kept_pairs

        return self._per_head(kept_pairs(self).double() / (self.q_len * self.k_len))

    @property
    def block_density(self) -> float:
        """Visited blocks / all blocks, mean over heads: what is paid for."""
        return float(self.block_density_per_head.mean())

    @property
    def density(self) -> float:
        """Kept pairs / all pairs of tokens, mean over heads; exact."""
        return float(self.density_per_head.mean())

    def to(self, device: torch.device | str) -> "BlockLists":
        """Return the same lists on another device; self where nothing has to move."""
        if self.device == torch.device(device):
            return self
        tables = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _INTS}
        return replace(self, **{name: table.to(device) for name, table in tables.items() if table is not None})

    def validate(self) -> "BlockLists":
        """Check the contents of every table; reads them all, so not for the hot path.

        Returns:
            self, so that it can be chained.

        Raises:
            ValueError: a token is missing or in two slots, an index is out of range or out of order, or a block is
                both full and partial.
        """
        check_contents(self)
        return self

    def to_mask(self) -> Tensor:
        """Return the token mask bool [H, q_len, k_len] that these lists mean; for small sizes."""
        from visparse_kernels.lists_views import token_mask

        return token_mask(self)

    def to_flex(self) -> "tuple[BlockMask, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]":
        """Return FlexAttention's ``BlockMask`` and its mask function, in slot space; see `lists_flex.to_flex`."""
        from visparse_kernels.lists_flex import to_flex

        return to_flex(self)

    def tile_masks(self) -> Tensor:
        """Return the tiles as bool [n_tiles, block_q, block_k]."""
        return unpack_bits(self.tiles)

    def _per_head(self, per_group: Tensor) -> Tensor:
        group = self.head_group.cpu().long()
        padded = torch.cat([per_group.cpu(), torch.zeros(1, dtype=torch.float64)])
        return padded[group]


_INTS = ("q_len", "k_len", "block_q", "block_k")


def _order(order: Tensor | None, length: int, block: int, device: torch.device) -> Tensor:
    if order is None:
        return identity_order(length, block, device)
    order = order.to(device=device, dtype=torch.int32)
    return order[None] if order.ndim == 1 else order
