"""Visited blocks of a pattern that is a product over the axes, with key boxes that begin where windows begin."""

from typing import NamedTuple

import torch
from torch import Tensor

from visparse.boxes_axis import cut_spans, masks_of, spans_of
from visparse.compile_bits import FULL
from visparse.distinct import scratch
from visparse.layout import Grid
from visparse.order import Tile
from visparse_kernels.bits import pack_bits


class _Axis(NamedTuple):
    starts: Tensor  # int64 [U, J], first key of each side
    seen: Tensor  # bool [U, J]
    kind: Tensor  # int64 [U, J], which mask; 0 where the side is full
    masks: Tensor  # bool [kinds, q side, k side]


def window_entries(
    tables: tuple[Tensor, Tensor, Tensor], grid: Grid, q_box: Tile, k_box: Tile, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the visited blocks and the key boxes; equal boxes of different query tiles are one.

    All is decided axis by axis, on small tables. What grows with the grid, a few numbers for each visited block, is
    done on the device without a loop over blocks.

    Args:
        tables: bool [length, length] of each axis, query by key.
        grid: (frames, height, width), in tokens.
        q_box: shape of the query tiles.
        k_box: shape of the key boxes.
        device: where the results are built.

    Returns:
        ``rows, cols, tile`` int64 [n] (query tile, key box, and mask or -1 for full), ``tiles`` int32
        [n_tiles, block_q, block_k / 32], and ``starts`` int64 [n_k, 3], origins of the key boxes.
    """
    axes = [_axis(*part, device) for part in zip(tables, q_box, k_box, strict=True)]
    seen = axes[0].seen
    for axis in axes[1:]:
        seen = seen[..., None, None] & axis.seen
    at = seen.nonzero(as_tuple=True)  # for every visited block: tile and side on each axis in turn
    rows, origin, kind = (at[0].new_zeros(len(at[0])) for _ in range(3))
    for axis, tile, side, length in zip(axes, at[0::2], at[1::2], grid, strict=True):
        rows = rows * len(axis.starts) + tile
        origin = origin * length + axis.starts[tile, side]
        kind = kind * len(axis.masks) + axis.kind[tile, side]

    used = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.bool, device=device)
    used[origin] = True
    cols = (used.cumsum(0) - 1)[origin]
    place = used.nonzero()[:, 0]
    starts = torch.stack([place // (grid[1] * grid[2]), place // grid[2] % grid[1], place % grid[2]], dim=1)

    kinds, index = torch.unique(torch.cat([kind.new_zeros(1), kind]), return_inverse=True)
    return rows, cols, torch.where(kind > 0, index[1:] - 1, FULL), _tiles(axes, kinds[1:]), starts


def _axis(table: Tensor, q_side: int, k_side: int, device: torch.device) -> _Axis:
    cut = cut_spans(spans_of(table, q_side), k_side)
    masks = masks_of(table, cut, q_side, k_side)[cut.seen & ~cut.full]
    bits = masks.flatten(1)
    distinct, index = torch.unique(bits, dim=0, return_inverse=True) if len(bits) else (bits, bits.new_zeros(0).long())
    kind = torch.zeros_like(cut.starts)
    kind[cut.seen & ~cut.full] = index + 1
    masks = torch.cat([bits.new_ones(1, q_side * k_side), distinct]).view(-1, q_side, k_side)
    return _Axis(*(part.to(device) for part in (cut.starts, cut.seen, kind, masks)))


def _tiles(axes: list[_Axis], kinds: Tensor) -> Tensor:
    """Multiply the masks of the axes; ``kinds`` counts as if they were digits."""
    block_q, block_k = 1, 1
    for axis in axes:
        block_q, block_k = block_q * axis.masks.shape[1], block_k * axis.masks.shape[2]
    parts = [torch.zeros(0, block_q, block_k // 32, dtype=torch.int32, device=kinds.device)]
    for part in kinds.split(max(1, scratch(kinds.device) // (block_q * block_k))):
        frames, height, width = (axis.masks for axis in axes)
        first = frames[part // (len(height) * len(width))][:, :, None, None, :, None, None]
        second = height[part // len(width) % len(height)][:, None, :, None, None, :, None]
        third = width[part % len(width)][:, None, None, :, None, None, :]
        parts.append(pack_bits((first & second & third).reshape(len(part), block_q, block_k)))
    return torch.cat(parts)
