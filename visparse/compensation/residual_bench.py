"""Measure what each storage of a residual costs in time and memory: `python -m visparse.compensation.residual_bench`.

One layer of one branch, at the size of Wan 14B at 720p where there is a GPU (under 20 s), small on a CPU. Prints one
JSON row per storage.
"""

import json
from collections.abc import Callable
from functools import partial

import torch

from visparse.bench.timing import Stopwatch
from visparse.compensation.residual_groups import TokenGroups
from visparse.compensation.residual_sizes import STORAGES
from visparse.compensation.residual_store import store
from visparse.layout import Layout

_REPEATS = 10


def measure(layout: Layout, heads: int, head_dim: int, device: str) -> list[dict[str, object]]:
    """Time storing and adding, with a cold cache.

    Args:
        layout: grid and extra tokens.
        heads: heads of the layer.
        head_dim: numbers per head.
        device: where the residual lies; bf16 on CUDA, fp32 on a CPU.

    Returns:
        One row per storage: median milliseconds of `store` and `add_to`, and bytes. For "host", storing is
        without the copy, which goes on behind it, and adding waits for the whole copy; ``add_fetched_ms`` is what
        remains of adding where the residual was fetched in time.
    """
    watch = Stopwatch(device)
    dtype = torch.bfloat16 if watch.device.type == "cuda" else torch.float32
    residual, out = (torch.randn(1, layout.tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    groups = TokenGroups.from_tiles(layout, (2, 2, 2)).to(device)

    def median(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        return round(watch.median(call, _REPEATS, before=before), 3)

    rows: list[dict[str, object]] = []
    for storage in STORAGES:
        chosen = groups if storage.startswith("average") else None
        kept = store(residual, storage, groups=chosen)
        rows.append(
            {
                "storage": storage,
                "store_ms": median(partial(store, residual, storage, groups=chosen)),
                "add_ms": median(partial(kept.add_to, out)),
                "add_fetched_ms": median(partial(kept.add_to, out), kept.prefetch),
                "nbytes": kept.nbytes,
                "host_nbytes": kept.host_nbytes,
                "tokens": layout.tokens,
                "heads": heads,
                "head_dim": head_dim,
                "dtype": str(dtype).removeprefix("torch."),
            }
        )
    return rows


def main() -> None:
    """Measure on the GPU, or small on the CPU, and print the rows."""
    with torch.no_grad():
        if torch.cuda.is_available():
            rows = measure(Layout((21, 45, 80)), 40, 128, "cuda")
        else:
            rows = measure(Layout((5, 16, 16)), 6, 64, "cpu")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
