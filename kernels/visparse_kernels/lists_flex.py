"""Block lists as FlexAttention's BlockMask: a second opinion, and a way to other kernels."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse_kernels.bits import unpack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from visparse_kernels.lists import BlockLists

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def to_flex(lists: "BlockLists") -> "tuple[BlockMask, MaskMod]":
    """Translate block lists to FlexAttention, in slot space.

    FlexAttention knows no order tables, so the caller gathers q, k and v into slots (``x[:, :, order.clamp(min=0)]``)
    and scatters the output rows of real slots back. Heads may have orders of their own; then each is gathered apart.

    Args:
        lists: the block lists.

    Returns:
        ``block_mask`` for ``[1, H, n_q * block_q, n_k * block_k]``, and the function ``(b, h, q_slot, k_slot) -> bool``
        that it applies inside partial blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n_q, n_k, groups, device = lists.n_q, lists.n_k, lists.groups, lists.device
    # tile number of each block: -2 not visited, -1 full, else a row of lists.tiles; one more group for skipped heads
    kind = torch.full(((groups + 1) * n_q, n_k), -2, dtype=torch.int64, device=device)
    for offsets, indices, tile in (
        (lists.full_offsets, lists.full_indices, torch.tensor(-1, device=device)),
        (lists.partial_offsets, lists.partial_indices, lists.partial_tiles.long()),
    ):
        row = torch.arange(groups * n_q, device=device).repeat_interleave(offsets.long().diff())
        kind[row, indices[: len(row)].long()] = tile
    head = torch.where(lists.head_group < 0, groups, lists.head_group).long()
    kind = kind.view(groups + 1, n_q, n_k)[head]
    masks = unpack_bits(lists.tiles)
    masks = torch.cat([masks, torch.ones_like(masks[:1]) if len(masks) else _ones(lists)])  # index -1: all ones
    real = (lists.k_order >= 0)[head.clamp(max=lists.k_order.shape[0] - 1)]
    padded = ~real.view(lists.heads, 1, n_k, lists.block_k).all(-1)

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        number = kind[h, q // lists.block_q, k // lists.block_k]
        index = torch.where(number < 0, masks.shape[0] - 1, number)
        return (number > -2) & real[h, k] & masks[index, q % lists.block_q, k % lists.block_k]

    full = (kind == -1) & ~padded
    partial = (kind > -2) & ~full
    block_mask = BlockMask.from_kv_blocks(
        *_dense_rows(partial),
        *_dense_rows(full),
        BLOCK_SIZE=(lists.block_q, lists.block_k),
        mask_mod=keep,
        seq_lengths=(n_q * lists.block_q, n_k * lists.block_k),
    )
    return block_mask, keep


def _ones(lists: "BlockLists") -> Tensor:
    return torch.ones(1, lists.block_q, lists.block_k, dtype=torch.bool, device=lists.device)


def _dense_rows(visited: Tensor) -> tuple[Tensor, Tensor]:
    count = visited.sum(-1).to(torch.int32)
    index = visited.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None].contiguous(), index[None].contiguous()
