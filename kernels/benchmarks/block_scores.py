"""Measure block scores: every variant of the kernel beside dense cuDNN attention, then the choice and the lists.

Run from the root of the tree: ``python3 kernels/benchmarks/block_scores.py [--json FILE]``, with the packages
importable. On a GPU: Wan2.1-14B at 720p, 75,600 tokens, 40 heads of 128, tiles (1, 8, 16), in less than 40 s. On a
CPU: 9,216 tokens, 6 heads of 64, beside dense attention, in less than 20 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visparse_kernels import block_scores, choose_per_head, choose_top_k, choose_top_p, lists_from_map
from visparse_kernels.block_scores import triton_impl
from visparse_kernels.block_scores.slots import gather_rows, sampled_rows
from visparse_kernels.boxes import box_tokens

SHARE = 0.125  # of the key blocks are chosen
VARIANTS = [
    triton_impl.Variant(tile_q=128, num_warps=8, num_stages=2, tma=True, registers=128),
    triton_impl.Variant(tile_q=128, num_warps=8, num_stages=2, tma=False, registers=128),
    triton_impl.Variant(tile_q=128, num_warps=8, num_stages=3, tma=True),
    triton_impl.Variant(tile_q=128, num_warps=4, num_stages=2, tma=True),
    triton_impl.Variant(tile_q=64, num_warps=4, num_stages=2, tma=True),
    triton_impl.Variant(tile_q=64, num_warps=4, num_stages=2, tma=False),
    triton_impl.Variant(tile_q=256, num_warps=8, num_stages=2, tma=True),
]


def tile_order(grid: tuple[int, int, int], tile: tuple[int, int, int], device: str) -> Tensor:
    """Return the order table, int32 [slots], that walks a grid tile by tile; tiles may hang over."""
    starts = torch.cartesian_prod(*(torch.arange(0, side, step) for side, step in zip(grid, tile, strict=True)))
    return box_tokens(grid, 0, tile, starts).flatten().to(device)


def median_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    """Return the median time of some calls, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[2:])


def dense(q: Tensor, k: Tensor, device: str) -> tuple[Tensor, Callable[[], object]]:
    """Return the log-sum-exp of dense attention [B, H, Sq] and a function that computes dense attention."""
    by_head = [x.transpose(1, 2) for x in (q, k, k)]
    if device == "cuda":
        lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*by_head, None, True)[1]

        def attention() -> object:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(*by_head)

        return lse.view(q.shape[0], q.shape[2], q.shape[1]).float(), attention
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*by_head)[1]
    return lse, lambda: scaled_dot_product_attention(*by_head)


def measure(device: str, repeats: int) -> dict[str, Any]:
    """Run everything and return settings and rows, times in milliseconds."""
    on_gpu = device == "cuda"
    grid, tile = ((21, 45, 80), (1, 8, 16)) if on_gpu else ((9, 32, 32), (1, 8, 16))
    heads, head_dim = (40, 128) if on_gpu else (6, 64)
    dtype, sample, block = torch.bfloat16 if on_gpu else torch.float32, 4, 128
    tokens = grid[0] * grid[1] * grid[2]
    make = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(1, tokens, heads, head_dim, dtype=dtype, device=device, generator=make) for _ in range(2))
    order = tile_order(grid, tile, device)
    lse, attention = dense(q, k, device)
    orders = {"q_order": order, "k_order": order, "block_q": block, "block_k": block}
    rows: list[dict[str, Any]] = []

    def add(what: str, run: Callable[[], object], **more: Any) -> float:
        try:
            took = median_ms(run, repeats, device)
        except Exception as error:
            rows.append({"what": what, "error": f"{type(error).__name__}: {str(error)[-200:]}", **more})
        else:
            first = rows[0]["ms"] if rows else took
            rows.append({"what": what, "ms": round(took, 3), "share_of_dense": round(took / first, 4), **more})
        print(rows[-1], flush=True)
        return float(rows[-1].get("ms", 0.0))

    add("dense attention", attention)
    if on_gpu:
        tables = sampled_rows(order, block, sample), order.view(-1, block)
        for cut in VARIANTS:
            for kind in ("mass", "mass_variance"):
                add(
                    "triton",
                    lambda cut=cut, kind=kind: triton_impl.run(
                        q, k, lse, *tables, None, head_dim**-0.5, kind == "mass_variance", cut
                    ),
                    kind=kind,
                    sample=sample,
                    **vars(cut),
                )
        add("copy of the keys into slot order", lambda: gather_rows(k, tables[1]))
    for kind, every in (
        ("mass", sample),
        ("mass_variance", sample),
        ("mass_variance", 1 if on_gpu else 2),
        ("pooled", 1),
    ):
        add(
            "block_scores",
            lambda kind=kind, every=every: block_scores(q, k, lse, kind=kind, sample=every, **orders),
            kind=kind,
            sample=every,
        )
    scores = block_scores(q, k, lse, kind="mass_variance", sample=sample, **orders)
    count = round(SHARE * scores.shape[-1])
    add("choose_top_k", lambda: choose_top_k(scores, count))
    add("choose_top_p", lambda: choose_top_p(scores, 0.9, 1, count))
    add("choose_per_head", lambda: choose_per_head(scores, SHARE, 1, 4 * count))
    kept = choose_per_head(scores, SHARE, 1, 4 * count)[0]
    groups = torch.arange(heads, dtype=torch.int32, device=device)
    for capacity in (None, count + 1):
        add(
            "lists_from_map",
            lambda capacity=capacity: lists_from_map(
                kept, q_len=tokens, k_len=tokens, head_group=groups, capacity=capacity, **orders
            ),
            capacity=capacity,
        )
    settings = {"grid": grid, "tile": tile, "heads": heads, "head_dim": head_dim, "dtype": str(dtype), "share": SHARE}
    return {"settings": {**settings, "repeats": repeats}, "rows": rows}


def main() -> None:
    """Measure on the GPU, or on the CPU where there is none, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__}
    if device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cudnn": str(torch.backends.cudnn.version())}
    result = {
        "schema": 1,
        "kind": "kernels",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": None,
        **measure(device, given.repeats),
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
