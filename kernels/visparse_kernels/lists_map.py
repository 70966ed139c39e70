"""Block lists from a map of kept blocks, on the device, in static shapes: nothing waits for it."""

import torch
from torch import Tensor

from visparse_kernels.boxes import Boxes
from visparse_kernels.kernels_apply import kernels_apply
from visparse_kernels.lists import BlockLists


def lists_from_map(
    kept: Tensor,
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    q_order: Tensor,
    k_order: Tensor,
    head_group: Tensor,
    boxes: Boxes | None = None,
    capacity: int | None = None,
) -> BlockLists:
    """Build lists of full blocks, without a mask, from the blocks that are kept.

    The shape of ``full_indices`` does not depend on what is kept: it has room for ``capacity`` blocks a row, and what
    lies behind the last offset means nothing. An empty row is allowed; its queries give 0 and -inf. Pass the same
    orders, boxes and head_group each time: what a kernel needs of them is found once for each tensor in memory.

    Args:
        kept: bool [G, n_q, n_k].
        q_len: number of query tokens.
        k_len: number of key tokens.
        block_q: query slots per block.
        block_k: key slots per block, a multiple of 32.
        q_order: int32 [n_q * block_q] or [G or 1, n_q * block_q], slot -> token, -1 padding.
        k_order: the same for keys.
        head_group: int32 [H], group of each head, -1 for a skipped head.
        boxes: where in a grid the blocks lie, if they do.
        capacity: the most blocks that a row keeps, on average over rows; None: all of them. It saves memory: 4 bytes
            for each block that the lists have room for.

    Returns:
        The lists, on the device of ``kept``.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: more blocks are kept than there is room for; on a GPU this is an assertion on the device.
    """
    q_order, k_order = (order[None] if order.ndim == 1 else order for order in (q_order, k_order))
    wanted = (q_order.shape[-1] // block_q, k_order.shape[-1] // block_k)
    if kept.dtype != torch.bool or kept.ndim != 3 or tuple(kept.shape[1:]) != wanted:
        raise ValueError(
            f"kept: wanted bool [groups, {wanted[0]}, {wanted[1]}] (query and key blocks of the order tables), got "
            f"{kept.dtype} {list(kept.shape)}; give a flag per block"
        )
    groups, n_q, n_k = kept.shape
    if capacity is not None and not 1 <= capacity <= n_k:
        raise ValueError(f"capacity: wanted 1 to {n_k} blocks a row, got {capacity}; leave it out for {n_k}")
    room = groups * n_q * (n_k if capacity is None else capacity)
    if kernels_apply(kept):
        from visparse_kernels.lists_map_triton import fill
    else:
        fill = _fill
    offsets, indices, zeros, fits = fill(kept, room, checked=capacity is not None)
    if fits is not None:
        torch._assert_async(fits, f"capacity: wanted room for all kept blocks, got {capacity} a row")
    none = offsets.new_empty(0)
    return BlockLists(
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=block_k,
        head_group=head_group.to(device=kept.device, dtype=torch.int32),
        q_order=q_order.contiguous(),
        k_order=k_order.contiguous(),
        full_offsets=offsets,
        full_indices=indices,
        partial_offsets=zeros,
        partial_indices=none,
        partial_tiles=none,
        tiles=none.view(0, block_q, block_k // 32),
        boxes=boxes,
    )


def _fill(kept: Tensor, room: int, *, checked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Write the lists of a map; see `lists_map_triton.fill`."""
    groups, n_q, n_k = kept.shape
    flat = kept.flatten()
    filled = flat.cumsum(0, dtype=torch.int32)
    offsets = torch.cat([filled.new_zeros(1), filled[n_k - 1 :: n_k]])
    # what is not kept goes to one more place, which is cut off
    place = torch.where(flat, filled - 1, room).clamp(max=room).long()
    blocks = torch.arange(n_k, dtype=torch.int32, device=kept.device).repeat(groups * n_q)
    indices = filled.new_zeros(room + 1).scatter_(0, place, blocks)
    return offsets, indices[:room], torch.zeros_like(offsets), offsets[-1] <= room if checked else None
