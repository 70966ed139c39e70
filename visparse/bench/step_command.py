"""`visparse bench step`: one denoiser forward of real architectures, dense and sparse, as a table and JSON."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

_DEFAULT_SECONDS = 540.0
_QUICK = ("wan-1.3b-480p", "flux-1k")


def add_step_parser(subparsers: Any) -> None:
    """Add the subcommand to `visparse bench`.

    Args:
        subparsers: what `add_subparsers` of the `bench` parser returned.
    """
    parser = subparsers.add_parser(
        "step",
        help="one denoiser forward of real architectures with random weights",
        description="Time one denoiser forward of real architectures with random weights and few layers, scaled to all "
        "layers: dense, with visparse's plans, and with self-attention removed.",
    )
    parser.add_argument("--model", action="append", metavar="NAME", help="may be given again (default: all but tiny)")
    parser.add_argument(
        "--plan",
        action="append",
        metavar="NAME",
        help="only what has this in its name, and what it is judged by; may be given again (default: all)",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="blocks of a kind that are run (default 3)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs; the median counts (default 3)")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument(
        "--seconds", type=float, default=_DEFAULT_SECONDS, metavar="N", help="time budget (default 540)"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(_QUICK)}, one timed run")
    parser.add_argument("--out", metavar="FILE", help="write the result there as JSON, after each model")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    parser.set_defaults(run=run_step)


def run_step(arguments: argparse.Namespace) -> int:
    """Measure, print, write.

    Args:
        arguments: as `add_step_parser` defines them.

    Returns:
        Exit code: 0 where every row that could run was right, 1 where one failed.
    """
    deadline = time.perf_counter() + arguments.seconds
    import torch

    from visparse.bench.models import ARCHITECTURES, find_architectures
    from visparse.bench.step import Options, measure
    from visparse.bench.step_contenders import check_names
    from visparse.bench.step_rows import complete, table
    from visparse.measure.generate import pick_device
    from visparse.measure.results import Record

    device = pick_device(arguments.device)
    every = [name for name in ARCHITECTURES if name != "tiny"] if device.type == "cuda" else ["tiny"]
    models = find_architectures(arguments.model or (list(_QUICK) if arguments.quick and len(every) > 1 else every))
    plans = tuple(arguments.plan or ())
    check_names(plans, models, device)
    options = Options(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        layers=arguments.layers,
        repeats=1 if arguments.quick else arguments.repeats,
        compiled=arguments.compile,
        deadline=deadline,
        plans=plans,
        notify=lambda text: print(text, file=sys.stderr, flush=True),
    )
    settings = {
        "models": [model.name for model in models],
        "plans": list(plans),
        "layers": options.layers,
        "repeats": options.repeats,
        "compile": options.compiled,
        "seconds": arguments.seconds,
        "seed": options.seed,
        "weights": "random",
        "scaled": "seconds are those of the published depth, from layers_measured and seconds_measured",
    }
    rows: list[dict[str, Any]] = []
    for model in models:
        rows += measure(model, options)
        complete(rows)
        record = Record.collect("step", settings, rows, device=str(device))
        if arguments.out:
            record.write(arguments.out)
    print(record.to_json() if getattr(arguments, "json", False) else table(rows))
    return int(any((row["why"] or "").startswith("failed") for row in rows))
