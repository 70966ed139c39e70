"""From visited blocks, or from a token mask, to sorted CSR tables."""

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits


def entries_to_csr(
    rows: Tensor, cols: Tensor, tile: Tensor, n_rows: int, n_cols: int, n_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort visited blocks and split them into the full and the partial CSR tables.

    Args:
        rows: int [n], row of each visited block.
        cols: int [n], its key block.
        tile: int [n], its tile, or -1 for a full block.
        n_rows: groups times query blocks.
        n_cols: key blocks.
        n_tiles: number of tiles.

    Returns:
        ``full_offsets, full_indices, partial_offsets, partial_indices, partial_tiles``, all int32.

    Raises:
        ValueError: an index is out of range, or a block is given twice.
    """
    if not rows.shape == cols.shape == tile.shape or rows.ndim != 1:
        raise ValueError(
            f"rows, cols, tile: wanted three one-axis tensors of one length, got {list(rows.shape)}, "
            f"{list(cols.shape)} and {list(tile.shape)}; give one element per visited block"
        )
    for name, values, low, high in (("rows", rows, 0, n_rows), ("cols", cols, 0, n_cols), ("tile", tile, -1, n_tiles)):
        if values.numel() and (int(values.min()) < low or int(values.max()) >= high):
            raise ValueError(
                f"{name}: wanted values from {low} to {high - 1}, got {int(values.min())} to {int(values.max())}; "
                "rows are group * n_q + query block, cols are key blocks, tile is -1 or an index into tiles"
            )
    key, perm = (rows.long() * n_cols + cols.long()).sort()
    if bool((key[1:] == key[:-1]).any()):
        twice = int(key[1:][key[1:] == key[:-1]][0])
        raise ValueError(
            f"rows, cols: block (row {twice // n_cols}, column {twice % n_cols}) is given twice; "
            "merge its masks and give it once"
        )
    rows, cols, tile = rows.long()[perm], cols.to(torch.int32)[perm], tile.to(torch.int32)[perm]
    full = tile < 0
    return (
        _offsets(rows[full], n_rows),
        cols[full].contiguous(),
        _offsets(rows[~full], n_rows),
        cols[~full].contiguous(),
        tile[~full].contiguous(),
    )


def entries_from_mask(
    mask: Tensor, q_order: Tensor, k_order: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find groups of equal heads, visited blocks and distinct tiles in a token mask.

    Args:
        mask: bool [H, q_len, k_len].
        q_order: int32 [n_q * block_q], slot -> token, -1 padding.
        k_order: int32 [n_k * block_k], the same for keys.
        block_q: query slots per block.
        block_k: key slots per block.

    Returns:
        ``head_group [H], rows [n], cols [n], tile [n], tiles [n_tiles, block_q, block_k / 32]``.
    """
    device = mask.device
    distinct, inverse = torch.unique(mask.flatten(1), dim=0, return_inverse=True)
    alive = distinct.any(1)
    number = torch.where(alive, alive.cumsum(0) - 1, -1)
    head_group = number[inverse]
    masks = distinct[alive].view(-1, *mask.shape[1:])
    groups, n_q, n_k = masks.shape[0], q_order.shape[0] // block_q, k_order.shape[0] // block_k

    slots = masks[:, q_order.clamp(min=0).long()][:, :, k_order.clamp(min=0).long()]
    real = (q_order >= 0)[:, None] & (k_order >= 0)[None, :]
    blocks = (slots & real).view(groups, n_q, block_q, n_k, block_k).transpose(2, 3)
    unreal = (~real).view(n_q, block_q, n_k, block_k).transpose(1, 2)
    visited = blocks.any(-1).any(-1)
    full = (blocks | unreal).all(-1).all(-1) & visited

    group, row, col = visited.nonzero(as_tuple=True)
    tile = torch.full_like(group, -1)
    partial = ~full[group, row, col]
    masked = blocks[group[partial], row[partial], col[partial]]
    tiles, index = torch.unique(pack_bits(masked), dim=0, return_inverse=True)
    if masked.shape[0] == 0:
        tiles = torch.zeros(0, block_q, block_k // 32, dtype=torch.int32, device=device)
    tile[partial] = index
    return head_group, group * n_q + row, col, tile, tiles


def _offsets(rows: Tensor, n_rows: int) -> Tensor:
    counts = torch.bincount(rows, minlength=n_rows)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int32, device=rows.device)
    offsets[1:] = counts.cumsum(0)
    return offsets
