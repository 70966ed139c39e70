"""Lists as peers want them: tokens gathered into slots, and padded rows of block numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from visparse_kernels import BlockLists


class Slots:
    """Gathers tokens into slots and back, for kernels that know no order tables.

    Args:
        lists: the block lists, with one order for all heads.

    Attributes:
        plain: slots are the tokens in their order, padding only behind the last.
        padded: some slot holds no token.
    """

    def __init__(self, lists: BlockLists) -> None:
        """Look at the orders."""
        self._q, self._k = lists.q_order[0].long(), lists.k_order[0].long()
        self.padded = bool((self._q < 0).any()) or bool((self._k < 0).any())
        self.plain = _plain(self._q, lists.q_len) and _plain(self._k, lists.k_len)
        real = (self._q >= 0).nonzero()[:, 0]
        self._slot = torch.empty_like(real)
        self._slot[self._q[real]] = real

    def queries(self, x: Tensor, axis: int) -> Tensor:
        """Put queries into slots along an axis; padding slots hold the first token."""
        return x.index_select(axis, self._q.clamp(min=0))

    def keys(self, x: Tensor, axis: int) -> Tensor:
        """Put keys or values into slots along an axis; padding slots hold the first token."""
        return x.index_select(axis, self._k.clamp(min=0))

    def tokens(self, x: Tensor, axis: int) -> Tensor:
        """Put query slots back into the order of tokens along an axis."""
        return x.index_select(axis, self._slot)


def no_slots(lists: BlockLists) -> str | None:
    """Why tokens cannot be gathered into slots once for all heads; None where they can."""
    return "heads have token orders of their own" if lists.q_order.shape[0] + lists.k_order.shape[0] > 2 else None


def not_whole_blocks(lists: BlockLists) -> str | None:
    """Why lists are no plain list of whole blocks; None where they are."""
    if lists.partial_indices.numel():
        return "blocks with a bit mask"
    return no_slots(lists)


def not_filled_blocks(lists: BlockLists) -> str | None:
    """Why lists are no plain list of whole blocks full of tokens; None where they are."""
    return not_whole_blocks(lists) or (f"tokens do not fill blocks of {lists.block_k}" if Slots(lists).padded else None)


def block_rows(lists: BlockLists) -> tuple[Tensor, Tensor]:
    """Full blocks of each head as padded rows.

    Args:
        lists: the block lists; no head is skipped.

    Returns:
        ``count`` int32 [heads, n_q] and ``index`` int32 [heads, n_q, longest], ascending; the rest of a row is 0.
    """
    count = lists.full_offsets.diff().view(lists.groups, lists.n_q)
    longest = max(1, int(count.max()))
    index = torch.zeros(lists.groups, lists.n_q, longest, dtype=torch.int32, device=lists.device)
    index[torch.arange(longest, device=lists.device) < count[..., None]] = lists.full_indices
    head = lists.head_group.long()
    return count[head].contiguous(), index[head].contiguous()


def _plain(order: Tensor, length: int) -> bool:
    return bool((order[:length] == torch.arange(length, device=order.device)).all()) and bool(
        (order[length:] < 0).all()
    )
