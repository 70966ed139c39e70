"""How long a search takes, and how much memory scoring needs, on architectures with random weights.

    python gallery/search/duration.py --model wan-1.3b-480p --device cuda --out duration.json
    python gallery/search/duration.py --model wan-14b-720p --layers 1 --device cuda --memory --out memory.json

What is found means nothing with random weights; what it costs does. The denoiser is called bare, `--calls` times a step
as guidance does, with noise that changes from step to step.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from visparse.bench.models import Architecture, find_architectures
from visparse.bench.step_build import build, make_inputs
from visparse.head_search.choose import Table
from visparse.head_search.searcher import Searcher
from visparse.head_search.settings import SearchSettings
from visparse.measure.generate import pick_device
from visparse.measure.results import Record


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="wan-1.3b-480p", help="an architecture of `visparse bench step`")
    add("--layers", type=int, help="blocks; default: as published")
    add("--grid", help="frames,height,width in tokens; default: the architecture's")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--steps", type=int, default=20)
    add("--calls", type=int, default=2, help="calls of the denoiser in a step")
    add("--attention", type=float, default=0.25, help="share of dense attention's time")
    add("--candidates", help="beginnings of names, such as near,top; default: all")
    add("--memory", action="store_true", help="score one step of one call only")
    add("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def steps_of(model: Architecture, steps: int, calls: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Arguments of the denoiser for every step and call: noise that turns slowly, and a falling timestep."""
    first, second = (make_inputs(model, device, dtype, seed)["hidden_states"] for seed in (0, 1))
    other = [make_inputs(model, device, dtype, 2 + call) for call in range(calls)]
    made = []
    for step in range(steps):
        part = step / max(steps - 1, 1)
        mixed = (1 - part) ** 0.5 * first + part**0.5 * second
        told = torch.full((1,), 1000.0 * (1 - part) + 1.0, device=device)
        made.append([{**one, "hidden_states": mixed, "timestep": told} for one in other])
    return made


def measured(args: argparse.Namespace) -> Record:
    """Search, and note what each part took."""
    model = find_architectures([args.model])[0]
    if args.grid:
        frames, height, width = (int(side) for side in args.grid.split(","))
        model = replace(model, grid=(frames, height, width))
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = args.layers or model.blocks[0].published
    denoiser = build(model, layers, device, dtype, 0)
    calls, steps = (1, 4) if args.memory else (args.calls, args.steps)
    inputs = steps_of(model, steps, calls, device, dtype)
    settings = SearchSettings(
        attention=args.attention,
        dense_steps=1 if args.memory else 0.25,
        refresh=None if args.memory else max(2, round(0.35 * steps)),
        judge=1 if args.memory else 4,
        candidates=tuple(args.candidates.split(",")) if args.candidates else None,
        probe=not args.memory,
    )
    searcher = Searcher(denoiser, settings, inputs=[inputs])
    held = _peak(device, reset=True)
    marks = [time.perf_counter()]
    ready = searcher.prepare()
    marks.append(time.perf_counter())
    reasons = searcher.score(ready)
    marks.append(time.perf_counter())
    table = Table(searcher.work.scores, ready.candidates, ready.costs, ready.schedules)
    chosen = searcher.choose(table, ready)
    marks.append(time.perf_counter())
    seconds = dict(zip(("prepare", "score", "choose"), (b - a for a, b in pairwise(marks)), strict=True))
    peak = _peak(device)
    row = {
        "label": model.name,
        "layers": layers,
        "tokens": model.tokens,
        "heads": model.heads,
        "candidates": len(ready.candidates.kept),
        "scored_calls": len(searcher.work.scores),
        "seconds": sum(seconds.values()),
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "bytes_before": held,
        "bytes_at_most": peak,
        "attention": chosen.attention,
        "family": chosen.family,
        "not_scored": sorted(set(reasons.values())),
    }
    given = {key: value for key, value in vars(args).items() if key != "out"} | {"dtype": str(dtype), "steps": steps}
    return Record.collect("search", given, [row], device=str(device))


def _peak(device: torch.device, *, reset: bool = False) -> int | None:
    """Most bytes that were allocated on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    record = measured(args)
    record.write(args.out)
    for row in record.rows:
        print({name: row[name] for name in row if name.startswith(("seconds", "bytes"))})


if __name__ == "__main__":
    main()
