"""What block lists mean: token masks and exact counts."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse_kernels.bits import unpack_bits

if TYPE_CHECKING:
    from visparse_kernels.lists import BlockLists

_CHUNK = 1 << 24  # elements of scratch in one step of kept_pairs


def order_of(table: Tensor, group: int) -> Tensor:
    """Return the order table of one group, int32 [n_slots], from a table of [G or 1, n_slots]."""
    return table[group if table.shape[0] > 1 else 0]


def query_block_mask(lists: "BlockLists", group: int, first: int, last: int) -> Tensor:
    """Return what the queries of some blocks see, with the keys in token order.

    Args:
        lists: the block lists.
        group: group of heads.
        first: first query block.
        last: end of the query blocks, not included.

    Returns:
        bool [(last - first) * block_q, k_len]; rows of padding slots are False.
    """
    return times_kept(lists, group, first, last) > 0


def times_kept(lists: "BlockLists", group: int, first: int, last: int) -> Tensor:
    """Count how often each query of some blocks keeps each token: 0 or 1, or the lists are wrong.

    Args:
        lists: the block lists.
        group: group of heads.
        first: first query block.
        last: end of the query blocks, not included.

    Returns:
        int32 [(last - first) * block_q, k_len]; rows of padding slots are 0.
    """
    n, block_q, block_k = last - first, lists.block_q, lists.block_k
    slots = torch.zeros(n, lists.n_k, block_q, block_k, dtype=torch.bool, device=lists.device)
    row = group * lists.n_q + first
    for offsets, indices, tile in (
        (lists.full_offsets, lists.full_indices, None),
        (lists.partial_offsets, lists.partial_indices, lists.partial_tiles),
    ):
        ends = offsets[row : row + n + 1].long()
        entries = slice(int(ends[0]), int(ends[-1]))
        q_block = torch.arange(n, device=lists.device).repeat_interleave(ends.diff())
        k_block = indices[entries].long()
        slots[q_block, k_block] = True if tile is None else unpack_bits(lists.tiles[tile[entries].long()])
    q_real = order_of(lists.q_order, group)[first * block_q : last * block_q] >= 0
    k_order = order_of(lists.k_order, group)
    k_real = k_order >= 0
    by_slot = slots.transpose(1, 2).reshape(n * block_q, -1) & q_real[:, None]
    by_token = torch.zeros(n * block_q, lists.k_len, dtype=torch.int32, device=lists.device)
    if lists.boxes is None:
        by_token[:, k_order[k_real].long()] = by_slot[:, k_real].to(torch.int32)
    else:  # a token may lie in several slots
        by_token.index_add_(1, k_order[k_real].long(), by_slot[:, k_real].to(torch.int32))
    return by_token


def token_mask(lists: "BlockLists") -> Tensor:
    """Return the token mask bool [H, q_len, k_len] that the lists mean."""
    mask = torch.zeros(lists.groups + 1, lists.q_len, lists.k_len, dtype=torch.bool, device=lists.device)
    for group in range(lists.groups):
        order = order_of(lists.q_order, group)
        by_slot = query_block_mask(lists, group, 0, lists.n_q)
        mask[group, order[order >= 0].long()] = by_slot[order >= 0]
    return mask[lists.head_group.long()]


def kept_pairs(lists: "BlockLists") -> Tensor:
    """Count the kept pairs of real tokens of each group, exactly.

    Returns:
        int64 [G] on the device of the lists.
    """
    device, n_q, groups = lists.device, lists.n_q, lists.groups
    total = torch.zeros(groups, dtype=torch.int64, device=device)
    q_real = (lists.q_order >= 0).view(-1, n_q, lists.block_q).expand(groups, -1, -1).flatten(0, 1)
    k_real = (lists.k_order >= 0).view(-1, lists.n_k, lists.block_k).expand(groups, -1, -1).flatten(0, 1)

    def entries(offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(groups * n_q, device=device).repeat_interleave(offsets.long().diff())
        return row, row // n_q * lists.n_k + indices[: len(row)].long()

    row, col = entries(lists.full_offsets, lists.full_indices)
    total.index_add_(0, row // n_q, q_real.sum(1)[row] * k_real.sum(1)[col])

    row, col = entries(lists.partial_offsets, lists.partial_indices)
    tile = lists.partial_tiles.long()
    whole = q_real.all(1)[row] & k_real.all(1)[col]
    chunk = max(1, _CHUNK // (lists.block_q * lists.block_k))
    bits = [unpack_bits(part).flatten(1).sum(1) for part in lists.tiles.split(chunk)]
    set_bits = torch.cat(bits) if bits else torch.zeros(0, dtype=torch.int64, device=device)
    total.index_add_(0, row[whole] // n_q, set_bits[tile[whole]])
    for some in (~whole).nonzero()[:, 0].split(chunk):
        kept = unpack_bits(lists.tiles[tile[some]]) & q_real[row[some]][:, :, None] & k_real[col[some]][:, None, :]
        total.index_add_(0, row[some] // n_q, kept.flatten(1).sum(1))
    return total
