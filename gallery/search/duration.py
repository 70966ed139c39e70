"""How long a search takes, and how much memory scoring needs, on architectures with random weights.

    python gallery/search/duration.py --model wan-1.3b-480p --device cuda --out duration.json
    python gallery/search/duration.py --model wan-14b-720p --layers 1 --device cuda --memory --out memory.json

What is found means nothing with random weights; what it costs does. The denoiser is called bare, `--calls` times a step
as guidance does, with noise that changes from step to step. Every few seconds a line says how far it is; what is not
scored within `--seconds` stays unscored, and the record says so.
"""

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from visparse.bench.models import Architecture, find_architectures
from visparse.bench.step_build import build, make_inputs
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.ready import Ready
from visparse.head_search.searcher import Searcher
from visparse.head_search.settings import SearchSettings
from visparse.measure.generate import pick_device
from visparse.measure.results import Record
from visparse.run import Progress


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
    add("--no-probe", action="store_true", help="costs by rates alone")
    add("--seconds", type=float, default=600.0, help="of the search; no call of the denoiser is begun after it")
    add("--every", type=float, default=5.0, help="seconds between lines of progress")
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
    calls, steps = (1, 4) if args.memory else (args.calls, args.steps)
    watcher = Watcher(args.every)
    with watcher:
        denoiser = build(model, layers, device, dtype, 0)
        inputs = steps_of(model, steps, calls, device, dtype)
        settings = SearchSettings(
            attention=args.attention,
            dense_steps=1 if args.memory else 0.25,
            refresh=None if args.memory else max(2, round(0.35 * steps)),
            judge=1 if args.memory else 4,
            candidates=tuple(args.candidates.split(",")) if args.candidates else None,
            probe=not (args.memory or args.no_probe),
            minutes=args.seconds / 60,
        )
        held = _peak(device, reset=True)
        marks = [time.perf_counter()]
        searcher = Searcher(denoiser, settings, inputs=[inputs], progress=watcher)
        watcher.begin("prepare", searcher)
        ready = searcher.prepare()
        marks.append(time.perf_counter())
        watcher.begin("score", searcher)
        reasons = searcher.score(ready)
        marks.append(time.perf_counter())
        watcher.begin("choose", searcher)
        chosen, refused = _choose(searcher, ready)
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
        "attention": None if chosen is None else chosen.attention,
        "family": None if chosen is None else chosen.family,
        "not_chosen": refused,
        "families": sorted({one.family for one in ready.candidates.kept}),
        "not_scored": sorted(set(reasons.values())),
    }
    given = {key: value for key, value in vars(args).items() if key != "out"} | {"dtype": str(dtype), "steps": steps}
    return Record.collect("search", given, [row], device=str(device))


class Watcher(Progress):
    """Says every few seconds how far a search is.

    Args:
        every: seconds between lines.
    """

    def __init__(self, every: float) -> None:
        self.every, self.begun = every, time.perf_counter()
        self.part, self.step, self.scores = "build", 0, dict[Any, Any]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, part: str, searcher: Searcher) -> None:
        """A part of the search begins."""
        self.part, self.scores = part, searcher.work.scores
        self.say()

    def tick(self) -> None:
        """One step is done."""
        self.step += 1

    def say(self) -> None:
        """Print a line now."""
        passed = time.perf_counter() - self.begun
        print(f"{passed:7.1f} s  {self.part}, step {self.step}, {len(self.scores)} calls scored", flush=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.say()

    def _run(self) -> None:
        while not self._over.wait(self.every):
            self.say()


def _choose(searcher: Searcher, ready: Ready) -> tuple[Chosen | None, str | None]:
    """The allocation; or None, and why there is none."""
    if not searcher.work.scores:
        return None, "nothing was scored; give it more --seconds"
    table = Table(searcher.work.scores, ready.candidates, ready.costs, ready.schedules)
    try:
        return searcher.choose(table, ready), None
    except ValueError as error:
        return None, str(error)


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
