"""Measure what leads from scores to lists on a GPU: choice, lists, program, hidden proxies; as kernels and in torch.

Run from the root of the tree: ``python3 kernels/benchmarks/list_kernels.py [--json FILE]``, with the packages
importable, on a machine with CUDA; less than 30 s. Microseconds of a call: ``host`` until it returns, ``device`` from
one call to the next in a row of calls, which is the longer of what host and device take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from visparse_kernels import choose_top_k, lists_from_map
from visparse_kernels.attend.gluon_program import build_full_program
from visparse_kernels.bits import identity_order
from visparse_kernels.boxes import Boxes
from visparse_kernels.proxies.hidden import hidden_proxies

SHAPES = {"saliency ViT, batch of 16": (96, 30, 44), "Wan2.1-14B at 720p": (40, 591, 591), "long": (40, 930, 930)}
SHARE, PARTS, REPEATS = 0.25, 4, 100
WHERE = [
    import_module(f"visparse_kernels.{name}")
    for name in ("lists_map", "attend.gluon_program", "block_scores.choosing", "proxies.hidden")
]


def microseconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return the time of a call on the host, and in a row of calls."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(REPEATS):
        run()
    host = time.perf_counter() - begun
    torch.cuda.synchronize()
    return tuple(round(t / REPEATS * 1e6, 1) for t in (host, time.perf_counter() - begun))


def starts(n: int, block: int) -> torch.Tensor:
    """Where runs of ``block`` tokens begin."""
    first = torch.arange(n, device="cuda") * block
    return torch.stack([torch.full_like(first, -1), torch.zeros_like(first), first], -1).to(torch.int32)[None]


def calls(groups: int, n_q: int, n_k: int) -> dict[str, Callable[[], object]]:
    """Return the calls; the last block of keys has padding."""
    scores = torch.rand(groups, n_q, n_k, device="cuda")
    count = max(1, round(SHARE * n_k))
    kept = choose_top_k(scores, count)
    tile = torch.arange(n_k * PARTS, device="cuda") // PARTS
    q_len, k_len = n_q * 128, n_k * 128 - 5
    boxes = Boxes(
        grid=(1, 1, k_len), first=0, q_box=(None,), k_box=(None,), q_starts=starts(n_q, 128), k_starts=starts(n_k, 128)
    )
    options: dict[str, Any] = {
        "q_len": q_len,
        "k_len": k_len,
        "block_q": 128,
        "block_k": 128,
        "q_order": identity_order(q_len, 128, "cuda"),
        "k_order": identity_order(k_len, 128, "cuda"),
        "head_group": torch.arange(groups, dtype=torch.int32, device="cuda"),
        "boxes": boxes,
        "capacity": count,
    }
    lists = lists_from_map(kept, **options)
    return {
        "choose_top_k": lambda: choose_top_k(scores, count),
        "lists_from_map": lambda: lists_from_map(kept, **options),
        "build_full_program": lambda: build_full_program(lists),
        "hidden_proxies": lambda: hidden_proxies(kept, tile),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args()
    rows = []
    for what, shape in SHAPES.items():
        for name, run in calls(*shape).items():
            for way in ("kernels", "torch"):
                with ExitStack() as stack:
                    for where in WHERE if way == "torch" else ():
                        stack.enter_context(mock.patch.object(where, "kernels_apply", return_value=False))
                    host, device = microseconds(run)
                rows.append({"what": what, "shape": shape, "call": name, "way": way, "host": host, "device": device})
                print(rows[-1], flush=True)
    result = {
        "schema": 1,
        "kind": "kernels",
        "device": {"name": torch.cuda.get_device_name()},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": None,
        "settings": {"share": SHARE, "proxies_per_tile": PARTS, "repeats": REPEATS},
        "rows": rows,
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
