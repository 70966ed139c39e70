"""Time of proxy tokens beside one dense attention, at the size of Wan-14B at 720p; a small case on a CPU.

Run from the root of the tree: ``python3 kernels/benchmarks/proxies.py``, with the packages importable. Prints the times
of every case, then one line of JSON. Takes less than 40 s on an H200. ``--tilings`` also times other ways to cut the
work of the attention kernel, and takes about a minute more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visparse_kernels import attend_proxies, pool_tokens
from visparse_kernels.attend.triton_tuned import HOPPER_SHARED_MEMORY, Tiling, fitting_stages
from visparse_kernels.bits import identity_order, pack_bits
from visparse_kernels.proxies.triton_impl import launch_attend, tiling

HIDE = 0.1  # share of tiles that a query block sees exactly


@dataclass(frozen=True)
class Case:
    """One size: a grid of tokens in tiles (frames, height, width), and the heads."""

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    heads: int
    head_dim: int
    block_q: int
    dtype: torch.dtype = torch.bfloat16


ON_CUDA = (
    Case((21, 45, 80), (2, 8, 8), 40, 128, 128),
    Case((21, 45, 80), (1, 8, 8), 40, 128, 128),
    Case((21, 45, 80), (1, 8, 8), 40, 64, 192),
    Case((1, 74, 74), (1, 8, 8), 96, 64, 192),  # 16 pictures of 1,036 px of a ViT-S/14
)
ON_CPU = (Case((9, 32, 32), (1, 8, 8), 4, 64, 192, torch.float32),)


def tile_members(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """Return the tokens of each tile of a grid, int32 [tiles, tokens of a tile], -1 where a tile hangs over."""
    tokens = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.int32).view(grid)
    over = [(0, -size % part) for size, part in zip(grid, tile, strict=True)]
    tokens = torch.nn.functional.pad(tokens, [n for pair in reversed(over) for n in pair], value=-1)
    for axis, part in enumerate(tile):
        tokens = tokens.unflatten(2 * axis, (-1, part))
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2).contiguous()


def median_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of a call in milliseconds, after one call that warms up."""
    call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


class Problem:
    """The inputs of a case.

    Args:
        case: the size.
        device: where it runs.
    """

    def __init__(self, case: Case, device: str) -> None:
        """Draw the inputs."""
        make = torch.Generator(device=device).manual_seed(0)
        self.case, self.device = case, device
        self.members = tile_members(case.grid, case.tile).to(device)
        tokens, n_proxies = case.grid[0] * case.grid[1] * case.grid[2], self.members.shape[0]
        shape = (1, tokens, case.heads, case.head_dim)
        self.q, self.k, self.v, self.out = (
            torch.randn(shape, generator=make, device=device, dtype=case.dtype) for _ in range(4)
        )
        self.lse = torch.randn(1, case.heads, tokens, generator=make, device=device)
        self.order = identity_order(tokens, case.block_q, device)
        words = -(-n_proxies // 32)
        gone = torch.rand(1, case.heads, self.order.shape[1] // case.block_q, 32 * words, generator=make, device=device)
        self.hidden = pack_bits(gone < HIDE)
        self.groups = torch.arange(case.heads, dtype=torch.int32, device=device)
        self.pooled = self.pool()

    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pool keys and values."""
        return pool_tokens(self.k, self.v, self.members)

    def attend(self) -> tuple[Tensor, Tensor]:
        """Merge the proxies into an output."""
        tables = (self.hidden, self.groups, self.order, self.case.block_q)
        return attend_proxies(self.q, self.out, self.lse, *self.pooled, *tables)

    def dense(self) -> Tensor:
        """Compute dense attention, on CUDA through cuDNN."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.device == "cuda" else nullcontext():
            return scaled_dot_product_attention(q, k, v)

    def row(self) -> dict[str, Any]:
        """Measure; return a row of figures."""
        pool_ms, attend_ms = median_ms(self.pool, self.device, 15), median_ms(self.attend, self.device, 15)
        dense_ms = median_ms(self.dense, self.device, 3)
        return {
            "label": "proxies",
            "tokens": self.q.shape[1],
            "heads": self.case.heads,
            "head_dim": self.case.head_dim,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "block_q": self.case.block_q,
            "proxies": self.members.shape[0],
            "pool_milliseconds": round(pool_ms, 4),
            "pool_terabytes_per_second": round(2 * self.k.numel() * self.k.element_size() / pool_ms / 1e9, 3),
            "attend_milliseconds": round(attend_ms, 4),
            "dense_milliseconds": round(dense_ms, 3),
            "share_of_dense": round((pool_ms + attend_ms) / dense_ms, 4),
        }

    def tilings(self) -> None:
        """Print the time of the attention kernel for other tilings; those that the rule takes are marked."""
        case = self.case
        usual = tiling(self.q.device, case.dtype, case.head_dim, case.block_q)
        fixed = (self.hidden, self.groups, self.order, case.block_q, case.head_dim**-0.5)
        new = (torch.empty_like(self.out), torch.empty_like(self.lse))
        for tile_q, tile_p, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            fits = stages <= fitting_stages(case.head_dim, case.dtype, tile_q, tile_p, HOPPER_SHARED_MEMORY)
            if case.block_q % tile_q or not fits or tile_q // warps < 16:
                continue
            cut = Tiling(tile_q, tile_p, warps, stages, "rule")

            def call(cut: Tiling = cut) -> None:
                launch_attend(self.q, self.out, self.lse, *self.pooled, *fixed, *new, cut)

            print(f"{median_ms(call, self.device, 7):9.3f} ms  {cut}{'  <- the rule' if cut == usual else ''}")


def main() -> None:
    """Measure all cases of this machine and print them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tilings", action="store_true", help="also time other tilings (CUDA only)")
    chosen = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for case in ON_CUDA if device == "cuda" else ON_CPU:
        problem = Problem(case, device)
        rows.append(problem.row())
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        if chosen.tilings and device == "cuda":
            problem.tilings()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    record = {
        "schema": 1,
        "kind": "kernels",
        "device": {"name": name},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": None,
        "settings": {"hidden": HIDE, "seed": 0},
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
