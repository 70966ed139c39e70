"""Checks of block lists: shapes at construction, contents on request."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse_kernels.boxes import check_boxes

if TYPE_CHECKING:
    from visparse_kernels.lists import BlockLists

_AXES = {
    "head_group": 1,
    "q_order": 2,
    "k_order": 2,
    "full_offsets": 1,
    "full_indices": 1,
    "partial_offsets": 1,
    "partial_indices": 1,
    "partial_tiles": 1,
    "tiles": 3,
}


def check_shapes(lists: "BlockLists") -> None:
    """Raise where a shape or a dtype does not fit; reads no tensor contents.

    Args:
        lists: the block lists to check.

    Raises:
        TypeError: a table is not an int32 tensor.
        ValueError: a size does not fit the others.
    """
    for name in ("q_len", "k_len", "block_q", "block_k"):
        if getattr(lists, name) < 1:
            raise ValueError(f"{name}: wanted at least 1, got {getattr(lists, name)}; give the size in tokens or slots")
    if lists.block_k % 32:
        raise ValueError(f"block_k: wanted a multiple of 32, got {lists.block_k}; masks are stored in 32-bit words")
    for name, axes in _AXES.items():
        table = getattr(lists, name)
        if not isinstance(table, Tensor) or table.dtype != torch.int32:
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"{name}: wanted an int32 tensor, got {got}; convert it with .to(torch.int32)")
        if table.ndim != axes:
            raise ValueError(f"{name}: wanted {axes} axes, got shape {list(table.shape)}; see BlockLists for its shape")
        if table.device != lists.full_offsets.device:
            raise ValueError(
                f"{name}: wanted all tables on one device ({lists.full_offsets.device}), got {table.device}; "
                "move the lists as a whole with BlockLists.to(device)"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name}: wanted a contiguous table, got strides {table.stride()}; call .contiguous()")
    for name, length, block in (("q_order", lists.q_len, lists.block_q), ("k_order", lists.k_len, lists.block_k)):
        slots = getattr(lists, name).shape[1]
        overlapping = name == "k_order" and lists.boxes is not None
        if slots % block or (slots < length and not overlapping):
            raise ValueError(
                f"{name}: wanted a multiple of the block size {block}, at least {length} slots, got {slots}; "
                "pad the table with -1"
            )
    n_rows = lists.full_offsets.shape[0] - 1
    n_q = lists.q_order.shape[1] // lists.block_q
    if n_rows < 0 or n_rows % n_q or lists.partial_offsets.shape[0] != n_rows + 1:
        raise ValueError(
            f"full_offsets, partial_offsets: wanted groups * {n_q} + 1 elements in both, got "
            f"{lists.full_offsets.shape[0]} and {lists.partial_offsets.shape[0]}; give a row per group and query block"
        )
    groups = n_rows // n_q
    for name in ("q_order", "k_order"):
        if getattr(lists, name).shape[0] not in (1, groups):
            raise ValueError(
                f"{name}: wanted 1 or {groups} rows (one per group), got {getattr(lists, name).shape[0]}; "
                "give one table for all groups or one per group"
            )
    if lists.partial_indices.shape != lists.partial_tiles.shape:
        raise ValueError(
            f"partial_tiles: wanted one tile per masked block ({lists.partial_indices.shape[0]}), "
            f"got {lists.partial_tiles.shape[0]}; give both tables together"
        )
    if lists.tiles.shape[1:] != (lists.block_q, lists.block_k // 32):
        raise ValueError(
            f"tiles: wanted [n_tiles, {lists.block_q}, {lists.block_k // 32}], got {list(lists.tiles.shape)}; "
            "pack masks with visparse_kernels.bits.pack_bits"
        )


def check_contents(lists: "BlockLists") -> None:
    """Raise where a table holds what the contract forbids; reads every table.

    Args:
        lists: the block lists to check.

    Raises:
        ValueError: a token is missing or in two slots, an index is out of range or out of order, a block is both
            full and partial, or boxes do not fit the order tables.
    """
    _order("q_order", lists.q_order, lists.q_len)
    if lists.boxes is None:
        _order("k_order", lists.k_order, lists.k_len)
    else:
        _range("k_order", lists.k_order, -1, lists.k_len)
        check_boxes("q", lists.boxes, lists.q_order, lists.block_q)
        check_boxes("k", lists.boxes, lists.k_order, lists.block_k)
    _range("head_group", lists.head_group, -1, lists.groups)
    _range("partial_tiles", lists.partial_tiles, 0, lists.tiles.shape[0])
    full = _csr("full", lists.full_offsets, lists.full_indices, lists.n_k)
    partial = _csr("partial", lists.partial_offsets, lists.partial_indices, lists.n_k)
    both = torch.isin(full, partial)
    if bool(both.any()):
        key = int(full[both][0])
        raise ValueError(
            f"full_indices, partial_indices: key block {key % lists.n_k} of row {key // lists.n_k} is in both lists; "
            "keep it in one of them"
        )
    if lists.boxes is not None:
        _once(lists)


def _order(name: str, order: Tensor, length: int) -> None:
    for group, row in enumerate(order):
        _range(name, row, -1, length)
        seen = torch.bincount(row[row >= 0].long(), minlength=length)
        if bool((seen != 1).any()):
            token = int((seen != 1).nonzero()[0])
            raise ValueError(
                f"{name}: wanted every token in exactly one slot, got token {token} in {int(seen[token])} slots "
                f"(table {group}); list each token once and pad with -1"
            )


def _once(lists: "BlockLists") -> None:
    from visparse_kernels.lists_views import times_kept

    for group in range(lists.groups):
        for block in range(lists.n_q):
            times = times_kept(lists, group, block, block + 1)
            if bool((times > 1).any()):
                slot, token = (int(i) for i in (times > 1).nonzero()[0])
                raise ValueError(
                    f"boxes: slot {slot} of query block {block} (group {group}) keeps token {token} "
                    f"{int(times[slot, token])} times; boxes of one list may overlap only where masks keep it once"
                )


def _range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() and (int(values.min()) < low or int(values.max()) >= high):
        raise ValueError(
            f"{name}: wanted values from {low} to {high - 1}, got {int(values.min())} to {int(values.max())}; "
            "build the lists with BlockLists.from_entries"
        )


def _csr(name: str, offsets: Tensor, indices: Tensor, n_k: int) -> Tensor:
    counts = offsets.long().diff()
    # full lists may have room to spare, which nothing points to
    filled = indices.shape[0] if name == "partial" else min(int(offsets[-1]), indices.shape[0])
    if int(offsets[0]) != 0 or int(offsets[-1]) != filled or bool((counts < 0).any()):
        raise ValueError(
            f"{name}_offsets: wanted offsets that rise from 0 to {filled}, got {int(offsets[0])} to "
            f"{int(offsets[-1])}; build the lists with BlockLists.from_entries"
        )
    indices = indices[:filled]
    _range(f"{name}_indices", indices, 0, n_k)
    row = torch.arange(counts.shape[0], device=offsets.device).repeat_interleave(counts)
    key = row * n_k + indices.long()
    if bool((key.diff() <= 0).any()):
        at = int((key.diff() <= 0).nonzero()[0])
        raise ValueError(
            f"{name}_indices: wanted strictly ascending key blocks in each row, got {int(indices[at])} before "
            f"{int(indices[at + 1])} in row {int(row[at])}; sort the row"
        )
    return key
