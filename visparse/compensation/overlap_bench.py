"""Measure what a look at the overlap costs beside one dense attention: `python -m visparse.compensation.overlap_bench`.

A look is what one layer does at one step to find out how much of its choice of tiles would be chosen again. At the size
of Wan 14B and of Wan 1.3B at 720p and of the model that ships where there is a GPU (under 20 s), small on a CPU.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from visparse.bench.timing import Stopwatch
from visparse.compensation.call import Call
from visparse.compensation.overlap import overlaps, sample_of
from visparse.compensation.refresh import Overlap
from visparse.compensation.tiles import tile_blocks, tiles_for
from visparse.layout import Layout
from visparse.measure.results import Record
from visparse.patterns import TopK

ON_CUDA = (((21, 45, 80), 40, 128), ((21, 45, 80), 12, 64), ((9, 32, 32), 4, 64))
ON_CPU = (((9, 32, 32), 4, 64),)
_SHARE = 0.125  # of the tiles, chosen


def measure(grid: tuple[int, int, int], heads: int, head_dim: int, device: str, repeats: int) -> dict[str, Any]:
    """Time a look and one dense attention, with a cold cache; bf16 on CUDA, fp32 on a CPU.

    Args:
        grid: frames, height, width, in tokens.
        heads: heads of the layer.
        head_dim: numbers per head.
        device: `"cpu"` or `"cuda"`.
        repeats: timed calls, after one that is not.

    Returns:
        A row: median milliseconds of both, and their ratio. On CUDA they are the device's, with its waits for what is
        not launched yet; `look_host_milliseconds` is what launching a look takes (on a CPU: the look itself).
    """
    watch = Stopwatch(device)
    dtype = torch.bfloat16 if watch.device.type == "cuda" else torch.float32
    layout = Layout(grid)
    tiles = tiles_for(layout, *tile_blocks(head_dim), watch.device, serpentine=True)
    selector = TopK(share=_SHARE, score="mass_variance", refresh=Overlap())
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, layout.tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    places = (1, heads, tiles.visual_q, tiles.visual_k)
    old = torch.rand(places, generator=generator, device=device) < _SHARE
    look = partial(overlaps, Call(q, k, v, None, None), tiles, 3, ("p",) * heads, (selector,) * heads, old, "auto")
    dense = partial(scaled_dot_product_attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    settle = partial(torch.cuda.synchronize, watch.device) if watch.device.type == "cuda" else lambda: None
    look_ms, dense_ms = watch.median(look, repeats), watch.median(dense, repeats)
    host_ms = Stopwatch("cpu").median(look, repeats, before=settle)
    return {
        "label": "look at the overlap",
        "grid": list(grid),
        "tokens": layout.tokens,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "tiles": tiles.visual_q,
        "tiles_looked_at": len(sample_of(tiles, 3, selector.sample).tiles),
        "milliseconds": round(look_ms, 4),
        "look_host_milliseconds": round(host_ms, 4),
        "dense_milliseconds": round(dense_ms, 4),
        "share_of_dense": round(look_ms / dense_ms, 5),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on the GPU, or small on the CPU; print the rows, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats: wanted at least 1, got {chosen.repeats}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        rows = [measure(*size, device, chosen.repeats) for size in (ON_CUDA if device == "cuda" else ON_CPU)]
    for row in rows:
        print(
            f"{row['tokens']} tokens, {row['heads']} heads of {row['head_dim']}: dense {row['dense_milliseconds']} ms, "
            f"look {row['milliseconds']} ms = {row['share_of_dense']:.2%} (launched in "
            f"{row['look_host_milliseconds']} ms), {row['tiles_looked_at']} of {row['tiles']} tiles"
        )
    settings = {"share": _SHARE, "seed": 0, "dense": "scaled_dot_product_attention, the default backend"}
    record = Record.collect("kernels", settings, rows, device=device)
    if chosen.out is not None:
        record.write(chosen.out)


if __name__ == "__main__":
    main()
