"""Time of `lay_out` beside plain copies of the same tensors, at the sizes of models.

Run from the root of the tree: ``python3 kernels/benchmarks/lay_out.py``, with the packages importable. Prints a line of
each case, then one line of JSON. Takes a few seconds on an H200; a small case on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import triton

from visparse_kernels import lay_out


@dataclass(frozen=True)
class Case:
    """One size; ``parts`` and ``pool`` are those of `lay_out`."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    blocks: tuple[int, int]
    parts: int = 8
    pool: int = 2


ON_CUDA = (
    Case(16, 5477, 6, 64, (192, 128)),
    Case(16, 5477, 6, 64, (192, 128), 0, 0),
    Case(1, 75600, 40, 128, (128, 128)),
    Case(1, 75600, 40, 128, (128, 128), 0, 0),
)
ON_CPU = (Case(1, 1370, 6, 64, (192, 128)),)


def median_ms(call: Callable[[], object], device: str) -> float:
    """Return the median time of ten calls, each of ten in a row, in milliseconds."""
    call()
    times = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 100)
    return statistics.median(times)


def row_of(case: Case, device: str) -> dict[str, Any]:
    """Measure one case."""
    make = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (case.batch, case.tokens, 3, case.heads, case.head_dim)
    q, k, v = torch.randn(shape, generator=make, device=device, dtype=dtype).unbind(2)
    token = torch.randperm(case.tokens, generator=make, device=device).to(torch.int32)
    orders = [torch.nn.functional.pad(token, (0, -case.tokens % block), value=-1) for block in case.blocks]
    laid = median_ms(lambda: lay_out(q, k, v, *orders, *case.blocks, parts=case.parts, pool=case.pool), device)
    copied = median_ms(lambda: [x.contiguous() for x in (q, k, v)], device)
    gathered = median_ms(lambda: [x.index_select(1, token) for x in (q, k, v)], device)
    return {
        "label": "lay_out",
        **{name: getattr(case, name) for name in ("batch", "tokens", "heads", "head_dim", "parts", "pool")},
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": round(laid, 4),
        "terabytes_per_second": round(6 * q.numel() * q.element_size() / laid / 1e9, 3),
        "copies_milliseconds": round(copied, 4),
        "index_select_milliseconds": round(gathered, 4),
    }


def main() -> None:
    """Measure all cases of this machine and print them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for case in ON_CUDA if device == "cuda" else ON_CPU:
        rows.append(row_of(case, device))
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    record = {
        "schema": 1,
        "kind": "kernels",
        "device": {"name": name},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": None,
        "settings": {"order": "random", "seed": 0},
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
