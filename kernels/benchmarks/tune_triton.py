"""Measure tilings of the Triton kernel on a GPU and write the table that the kernel reads.

Run from the root of the tree: ``python3 kernels/benchmarks/tune_triton.py --json triton_tuned.json``, with the packages
importable. Takes about a minute with 16 cores. What wins for each head size and block size is the tiling with the
smallest geometric mean of two times: all blocks kept, and random blocks of every head. Put the file beside the kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visparse_kernels import BlockLists
from visparse_kernels.attend.triton_impl import launch
from visparse_kernels.attend.triton_tuned import HOPPER_SHARED_MEMORY, Tiling, fitting_stages
from visparse_kernels.lists_views import query_block_mask
from visparse_kernels.testing import check_close, eager, random_lists
from visparse_kernels.testing_compile import assemble, hopper_driver

HEAD_DIMS = (64, 128)
BLOCKS = ((128, 64), (128, 128), (192, 128), (64, 64))
DTYPE, DEVICE = torch.bfloat16, "cuda"
TOKENS, HEADS, KEEP = 16300, 24, 0.125  # no multiple of a block, as in real models, so keys are padded
MOST_SPILLED = 256  # bytes; sums that spill take thousands
ROUNDS, REPEATS = 7, 3


@dataclass(frozen=True)
class Candidate:
    """A tiling for one case.

    Args:
        head_dim: size of a head.
        block_q: query slots per block of the lists.
        block_k: key slots per block of the lists.
        cut: the tiling.
    """

    head_dim: int
    block_q: int
    block_k: int
    cut: Tiling


def candidates(head_dim: int, block_q: int, block_k: int) -> list[Candidate]:
    """Return the tilings that are tried for one case: one warpgroup for 64 queries, one or two for 128."""
    found = []
    for tile_q, tile_k, warps, stages in product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
        divides = block_q % tile_q == 0 and block_k % tile_k == 0
        fits = stages <= fitting_stages(head_dim, DTYPE, tile_q, tile_k, HOPPER_SHARED_MEMORY)
        if divides and fits and warps <= tile_q // 16:
            found.append(Candidate(head_dim, block_q, block_k, Tiling(tile_q, tile_k, warps, stages, "table")))
    return found


def compile_one(candidate: Candidate, bias: bool = False) -> dict[str, int] | str:
    """Compile a candidate into Triton's cache without touching the GPU; return its registers, or what went wrong."""
    torch.set_num_threads(1)
    block_q, block_k = candidate.block_q, candidate.block_k
    k_len = 2 * block_k - 4
    lists = random_lists(q_len=block_q, k_len=k_len, block_q=block_q, block_k=block_k, head_group=[0] * HEADS)
    q, k = (torch.zeros(1, length, HEADS, candidate.head_dim, dtype=DTYPE) for length in (block_q, k_len))
    lse = torch.zeros(1, HEADS, block_q)
    key_bias = torch.zeros(1, 1, k_len) if bias else None
    try:
        with hopper_driver():
            made = assemble(launch(q, k, k, q, lse, lists, 1.0, key_bias, candidate.cut, warm_up=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {"registers": made.registers, "spilled": made.spilled, "shared": made.shared}


def build_lists(block_q: int, block_k: int, keep: float) -> BlockLists:
    """Keep the same share of random blocks in every row, apart for each head; all blocks where ``keep`` is 1."""
    groups = 1 if keep == 1 else HEADS
    n_q, n_k = -(-TOKENS // block_q), -(-TOKENS // block_k)
    make = torch.Generator().manual_seed(0)
    cols = torch.rand(groups * n_q, n_k, generator=make).argsort(1)[:, : max(1, round(keep * n_k))]
    rows = torch.arange(groups * n_q)[:, None].expand_as(cols)
    lists = BlockLists.from_entries(
        q_len=TOKENS,
        k_len=TOKENS,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.arange(HEADS) % groups,
        q_order=None,
        k_order=None,
        rows=rows.flatten(),
        cols=cols.flatten(),
        tile=torch.full((cols.numel(),), -1),
    )
    return lists.to(DEVICE)


class Problem:
    """One case on the GPU: inputs, lists, and the truth for the first and the last query block of three heads.

    Args:
        head_dim: size of a head.
        block_q: query slots per block.
        block_k: key slots per block.
        keep: share of blocks that are kept.
    """

    def __init__(self, head_dim: int, block_q: int, block_k: int, keep: float) -> None:
        """Draw the inputs and compute the truth."""
        make = torch.Generator(device=DEVICE).manual_seed(0)
        shape = (TOKENS, HEADS, head_dim)
        self.q, self.k, self.v = torch.randn(3, 1, *shape, generator=make, device=DEVICE).to(DTYPE).unbind()
        self.out, self.lse = torch.empty_like(self.q), torch.empty(1, HEADS, TOKENS, device=DEVICE)
        self.lists = build_lists(block_q, block_k, keep)
        self.scale = head_dim**-0.5
        self.flops = 4.0 * self.lists.block_density * TOKENS * TOKENS * head_dim * HEADS
        rows = [(head, block) for head in (0, 11, 23) for block in (0, self.lists.n_q - 1)]
        self.truth = [(head, *self._truth(head, block)) for head, block in rows]

    def _truth(self, head: int, block: int) -> tuple[slice, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        size = self.lists.block_q
        rows = slice(block * size, min(TOKENS, (block + 1) * size))
        mask = query_block_mask(self.lists, int(self.lists.head_group[head]), block, block + 1)[
            : rows.stop - rows.start
        ]
        q, k, v = self.q[:, rows, [head]], self.k[:, :, [head]], self.v[:, :, [head]]
        wanted = eager(q.double(), k.double(), v.double(), mask[None], self.scale)
        return rows, wanted, eager(q, k, v, mask[None], self.scale)

    def attend(self, cut: Tiling) -> None:
        """Run the kernel once."""
        launch(self.q, self.k, self.v, self.out, self.lse, self.lists, self.scale, None, cut)

    def check(self, cut: Tiling) -> str | None:
        """Run the kernel once; return what breaks the error rule, or None."""
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)
        self.attend(cut)
        try:
            for head, rows, (wanted, wanted_lse), (plain, plain_lse) in self.truth:
                check_close("out [b, s, h, d]", self.out[:, rows, [head]], wanted, plain, DTYPE)
                check_close("lse [b, h, s]", self.lse[:, [head], rows], wanted_lse, plain_lse, DTYPE)
        except AssertionError as error:
            return str(error)
        return None

    def cudnn(self) -> None:
        """Run cuDNN's dense attention on the same inputs."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(q, k, v)


def median_times(calls: list[Any]) -> list[float]:
    """Return the median time of each call in milliseconds; the calls take turns, so that clocks are alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(ROUNDS):
        for call, seen in zip(calls, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPEATS):
                call()
            end.record()
            end.synchronize()
            seen.append(start.elapsed_time(end) / REPEATS)
    return [statistics.median(seen) for seen in times]


def measure(cases: list[Candidate]) -> tuple[list[dict[str, Any]], float]:
    """Check and time all candidates of one case.

    Returns:
        A row of figures for each, fastest first, and the rate of cuDNN's dense attention in TFLOP/s.
    """
    first = cases[0]
    full, sparse = (Problem(first.head_dim, first.block_q, first.block_k, keep) for keep in (1.0, KEEP))
    wrong = [full.check(case.cut) or sparse.check(case.cut) for case in cases]
    for case, reason in zip(cases, wrong, strict=True):
        if reason:
            print(f"WRONG, left out: {case}: {reason}")
    cuts = [case.cut for case, reason in zip(cases, wrong, strict=True) if reason is None]
    calls = [lambda c=cut, p=problem: p.attend(c) for problem in (full, sparse) for cut in cuts]
    *times, dense = median_times([*calls, full.cudnn])
    rows = []
    for cut, full_ms, sparse_ms in zip(cuts, times[: len(cuts)], times[len(cuts) :], strict=True):
        numbers = asdict(cut)
        del numbers["source"]
        figures = {
            "milliseconds_full": round(full_ms, 4),
            "milliseconds_sparse": round(sparse_ms, 4),
            "tflops_full": round(full.flops / full_ms / 1e9, 1),
            "tflops_sparse": round(sparse.flops / sparse_ms / 1e9, 1),
        }
        rows.append(numbers | figures)
    rows.sort(key=lambda row: math.sqrt(row["milliseconds_full"] * row["milliseconds_sparse"]))
    return rows, full.flops / dense / 1e9


def show(*cells: object) -> None:
    """Print one line of the table."""
    widths = (4, 9, 9, 6, 7, 6, 7, 8, 8, 7)
    print("".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=False)), *cells[len(widths) :])


def choose(cases: list[Candidate], made: dict[Candidate, dict[str, int] | str]) -> dict[str, Any] | None:
    """Measure what compiled well for one case, print its figures, and return the row of the fastest; None for none."""
    head_dim, blocks = cases[0].head_dim, f"{cases[0].block_q}x{cases[0].block_k}"
    left: dict[Tiling, dict[str, int]] = {}
    for case in cases:
        numbers = made[case]
        if isinstance(numbers, str) or numbers["spilled"] > MOST_SPILLED or numbers["shared"] > HOPPER_SHARED_MEMORY:
            print(f"{head_dim:>4}{blocks:>9} left out: {case.cut}: {numbers}")
        else:
            left[case.cut] = numbers
    rows, cudnn = measure([replace(cases[0], cut=cut) for cut in left]) if left else ([], 0.0)
    for row in rows:
        cut = Tiling(row["tile_q"], row["tile_k"], row["num_warps"], row["num_stages"], "table")
        row |= left[cut]
        figures = [row[name] for name in ("registers", "spilled", "tflops_full", "tflops_sparse")]
        tile = f"{cut.tile_q}x{cut.tile_k}"
        show(
            head_dim,
            blocks,
            tile,
            cut.num_warps,
            cut.num_stages,
            *figures,
            f"{cudnn:.1f}",
            "<-" if row is rows[0] else "",
        )
    return rows[0] | {"tflops_cudnn": round(cudnn, 1)} if rows else None


def main() -> None:
    """Compile everything in worker processes, then measure case by case, print one table and write the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, required=True, help="file to write")
    path: Path = options.parse_args().json
    begin = time.perf_counter()
    cases = {(dim, *blocks): candidates(dim, *blocks) for dim, blocks in product(HEAD_DIMS, BLOCKS)}
    every = [candidate for found in cases.values() for candidate in found]
    # workers are forked before CUDA starts in this process, and never start it themselves
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as workers:
        made = dict(zip(every, workers.map(compile_one, every), strict=True))
    print(f"{len(every)} candidates compiled in {time.perf_counter() - begin:.0f} s")

    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if capability != (9, 0):
        raise SystemExit(f"the candidates are compiled for sm_90, and this GPU is {capability}; run it on a Hopper GPU")
    show("D", "block", "tile", "warps", "stages", "regs", "spill", "full", f"{KEEP:.1%}", "cuDNN", "(TFLOP/s, useful)")
    rows = []
    for (head_dim, block_q, block_k), found in cases.items():
        if (row := choose(found, made)) is not None:
            key = {"capability": capability, "head_dim": head_dim, "itemsize": DTYPE.itemsize}
            rows.append(key | {"block_q": block_q, "block_k": block_k} | row)
    result = {
        "schema": 1,
        "kind": "tuned",
        "device": properties.name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "tokens": TOKENS,
            "heads": HEADS,
            "dtype": str(DTYPE).removeprefix("torch."),
            "kept_blocks": KEEP,
            "rounds": ROUNDS,
            "repeats": REPEATS,
            "seed": 0,
        },
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path} after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
