"""Tiles, warps and buffers of the Triton kernel: from a table that was measured, else from one fixed rule."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

TABLE = Path(__file__).with_name("triton_tuned.json")  # written by kernels/benchmarks/tune_triton.py
HOPPER_SHARED_MEMORY = 232448  # bytes that a block of threads may use on sm_90
_SMALLEST_TILE = (16, 32)  # tensor cores take 16 queries at least, a word of a mask holds 32 keys


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts the blocks of a list, and how it is launched.

    Args:
        tile_q: query slots that one program serves; divides ``block_q``.
        tile_k: key slots of one step; divides ``block_k``.
        num_warps: warps of a program.
        num_stages: buffers of K and V.
        source: whether the measured table or the rule says so.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    source: Literal["table", "rule"]


def find_tiling(
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    *,
    ragged: bool = True,
    capability: tuple[int, int] = (9, 0),
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> Tiling | None:
    """Return the tiling of a case: the row of the table that was measured for it, else what the rule says.

    The table was measured with padded keys, as nearly all models have. Where no key is padded, K and V come without
    predicates, and the rule's larger tiles were faster on an H200 (at 32,768 tokens, 24 heads of 128 and 12.5 % of the
    blocks of 128 x 64: 366 against 316 TFLOP/s), so the table is left aside.

    Args:
        head_dim: size of a head; the kernel pads it to a power of two.
        dtype: dtype of q, k and v.
        block_q: query slots per block, a multiple of 16.
        block_k: key slots per block, a multiple of 32.
        ragged: whether the key order holds padding.
        capability: compute capability of the device, (major, minor).
        shared_memory: bytes of shared memory that a block of threads may use there.

    Returns:
        The tiling, the same at every call; None where not even the smallest tile fits.
    """
    key = (capability, padded(head_dim), dtype.itemsize, block_q, block_k)
    return (table().get(key) if ragged else None) or rule(head_dim, dtype, block_q, block_k, shared_memory)


def rule(head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, shared_memory: int) -> Tiling | None:
    """Return the tiling of a case that nobody measured; the arguments are those of `find_tiling`.

    The largest power of two that divides the block, up to a limit that keeps sums and scores in registers on sm_90
    (seen by compiling): 128 queries (64 above a head size of 128) and 64 keys, four warps where they hold sums and
    scores, else eight. Products in fp32 use no tensor cores and hold whole rows in registers: there 4096 sums and 32
    keys, eight warps. Tiles are halved, keys first, until two buffers of K and V fit.
    """
    dim = padded(head_dim)
    plain = dtype == torch.float32
    most_q, most_k = (min(128, 4096 // dim), 32) if plain else (128 if dim <= 128 else 64, 64)
    tile_q, tile_k = min(block_q & -block_q, most_q), min(block_k & -block_k, most_k)
    while (stages := fitting_stages(dim, dtype, tile_q, tile_k, shared_memory)) < 2:
        if tile_k > _SMALLEST_TILE[1]:
            tile_k //= 2
        elif tile_q > _SMALLEST_TILE[0]:
            tile_q //= 2
        else:
            break
    if stages < 1:
        return None
    warps = 8 if plain or tile_q * (dim + tile_k) > 128 * 128 else 4
    return Tiling(tile_q, tile_k, warps, min(2 if plain else 3, stages), "rule")


def fitting_stages(dim: int, dtype: torch.dtype, tile_q: int, tile_k: int, shared_memory: int) -> int:
    """Return how many buffers of K and V fit into shared memory beside q, the weights (fp32) and a reserve."""
    size = dtype.itemsize
    weights = tile_q * tile_k * size if dtype == torch.float32 else 0
    reserve = 4096  # order tables, bias and scratch of reductions
    return (shared_memory - reserve - tile_q * dim * size - weights) // (2 * tile_k * dim * size)


def padded(head_dim: int) -> int:
    """Return the head size that the kernel computes with: the next power of two, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def table() -> dict[tuple[Any, ...], Tiling]:
    """Return the measured tilings by (capability, padded head size, bytes of the dtype, block_q, block_k)."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return {
        (tuple(row["capability"]), row["head_dim"], row["itemsize"], row["block_q"], row["block_k"]): Tiling(
            row["tile_q"], row["tile_k"], row["num_warps"], row["num_stages"], "table"
        )
        for row in rows
    }
