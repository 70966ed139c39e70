"""`visparse search`: which pattern serves which head, found offline, as a plan file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from visparse.cli.options import blocks, positive
from visparse.cli.patterns import triple


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "search",
        help="find the pattern of every head within a budget of measured time, as a plan file",
        description="Run a model dense on a few prompts or pictures, score every candidate for every head, and write a "
        "plan file. A search that was stopped goes on where it was.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a diffusers pipeline: folder or hub id; or a vision transformer: timm:NAME or timm:FOLDER",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of timm:NAME (default: timm fetches them)")
    parser.add_argument("--out", default="plan.json", metavar="FILE", help="the plan (default plan.json)")
    goal = parser.add_argument_group("goal (exactly one)")
    goal.add_argument("--speedup", type=float, metavar="X", help="of the denoising of a run, dense steps counted")
    goal.add_argument("--attention", type=float, metavar="SHARE", help="of dense attention's time, in a sparse step")
    goal.add_argument("--density", type=float, metavar="SHARE", help="of all blocks, in a sparse step")
    goal.add_argument("--max-error", type=float, metavar="ERROR", help="predicted relative error of attention's output")
    what = parser.add_argument_group("calibration")
    what.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: that of the model's demo)")
    what.add_argument("--images", metavar="FOLDER", help="pictures, for a vision transformer, in place of prompts")
    what.add_argument(
        "--grid", type=_grid, metavar="FxHxW", help="size in tokens, in place of the next three; pictures: 1xHxW"
    )
    what.add_argument("--height", type=positive, metavar="PIXELS")
    what.add_argument("--width", type=positive, metavar="PIXELS")
    what.add_argument("--frames", type=positive, metavar="N")
    what.add_argument("--steps", type=positive, metavar="N", help="denoiser steps of a run")
    what.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; 1 is off")
    what.add_argument("--judge", type=positive, default=4, metavar="N", help="steps that are scored (default 4)")
    what.add_argument("--rows", type=_rows, default=12, metavar="N|all", help="sampled tiles of queries (default 12)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of noise and sample (default 0)")
    how = parser.add_argument_group("what may be chosen")
    how.add_argument(
        "--family",
        choices=("best", "plain", "foveal", "pooled"),
        default="best",
        help="plain: exact masks; foveal: tiles, proxies and a residual; pooled: foveal without anything reused, for "
        "models without steps (default best: plain and one of these)",
    )
    how.add_argument("--candidates", type=_names, metavar="LIST", help="only names that begin so, such as tube,frame")
    how.add_argument("--dense-steps", type=_steps, metavar="N", help="number or share (default 0.25; pictures: 0)")
    how.add_argument("--refresh", type=_refresh, default=0.6, metavar="N", help="number, share or none (default 0.6)")
    how.add_argument(
        "--ranges", action="store_true", help="each stretch of steps between two refreshes is allocated on its own"
    )
    how.add_argument("--per-tile", type=positive, default=1, metavar="N", help="proxies of each tile (default 1)")
    how.add_argument(
        "--blocks", type=blocks, metavar="QxK", help="queries and keys of a tile, such as 96x32 (default: Hopper's)"
    )
    how.add_argument(
        "--rule", choices=("budget", "sparse-vdit"), default="budget", help="sparse-vdit: as published, without a goal"
    )
    how.add_argument("--limit", type=float, default=1.0, help="the published rule's epsilon (default 1)")
    how.add_argument("--rates", metavar="DEVICE", help="whose milliseconds count: cpu, h200 (default: this device)")
    how.add_argument(
        "--no-probe", action="store_true", help="costs by rates alone (default: two plans of each family are timed)"
    )
    how.add_argument("--share", type=float, metavar="SHARE", help="of attention in a dense step (default: measured)")
    run = parser.add_argument_group("how to run")
    run.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    run.add_argument("--budget-minutes", type=float, metavar="N", help="what is not scored by then stays dense")
    run.add_argument(
        "--refine", type=int, default=0, metavar="N", help="judge N allocations by the model's output, 12 is thorough"
    )
    run.add_argument(
        "--weigh", type=int, default=0, metavar="N", help="with --refine: measure what N groups of layers matter"
    )
    run.add_argument(
        "--try-dense-steps",
        type=_all_steps,
        default=(),
        metavar="LIST",
        help="with --refine and --speedup, such as 2,4",
    )
    run.add_argument(
        "--try-refresh", type=_all_refreshes, default=(), metavar="LIST", help="the same, such as none,0.5"
    )
    run.add_argument("--work", metavar="FILE", help="work file (default: that of the plan, with .work.jsonl)")
    run.add_argument("--dry-run", action="store_true", help="print candidates, their cost and the time, and stop")
    parser.set_defaults(run=main, parser=parser)


def main(arguments: argparse.Namespace) -> int:
    """Search as the arguments say."""
    from visparse.cli.progress import Bar, wants_bar
    from visparse.head_search.build import write_plan
    from visparse.head_search.searcher import Searcher
    from visparse.head_search.settings import SearchSettings
    from visparse.head_search.shard import processes
    from visparse.timm_models import is_timm

    pictures = is_timm(arguments.model)
    _check_kind(arguments, pictures)
    given = _of_pictures(arguments) if pictures else _of_prompts(arguments)
    out = Path(arguments.out)
    work = None if arguments.dry_run else Path(arguments.work or out.with_name(out.name + ".work.jsonl"))
    direct = ("speedup", "attention", "density", "max_error", "family", "rule", "limit", "candidates", "ranges")
    refining = ("refine", "weigh", "try_dense_steps", "try_refresh")
    settings = SearchSettings(
        **given,
        minutes=arguments.budget_minutes,
        work=work,
        probe=not arguments.no_probe,
        **{
            name: getattr(arguments, name)
            for name in (*direct, *refining, "refresh", "per_tile", "blocks", "judge", "rows", "seed", "rates", "share")
        },
    )
    processes()  # before the model is loaded: each process takes its own device
    target, inputs = _vision_transformer(arguments) if pictures else (_pipeline(arguments), [])
    bar = Bar() if wants_bar() else None
    try:
        searcher = Searcher(target, settings, inputs=inputs, progress=bar)
        if arguments.dry_run:
            outlook = searcher.outlook()
            print(json.dumps({"schema": 1, **outlook.to_dict()}, indent=2) if arguments.json else outlook)
            return 0
        plan = searcher.search()
    finally:
        if bar is not None:
            bar.close()
    if searcher.rank == 0:
        write_plan(plan, out)
        print(json.dumps(plan.to_dict(), indent=2) if arguments.json else f"{plan.describe()}\nwritten to {out}")
    return 0


def _check_kind(arguments: argparse.Namespace, pictures: bool) -> None:
    """Refuse options of the other kind of model, and pictures that are missing; exits with code 2."""
    for name in ("prompts", "frames", "steps", "guidance", "images", "checkpoint"):
        if getattr(arguments, name) is not None and pictures != (name in ("images", "checkpoint")):
            kind = "a vision transformer" if pictures else "a pipeline"
            arguments.parser.error(f"argument --{name}: {arguments.model} is {kind}, which has none; leave it out")
    given = [name for name in ("height", "width", "frames") if getattr(arguments, name) is not None]
    if arguments.grid is not None and (pictures or given):
        why = "with pictures: give --height and --width" if pictures else f"with --{given[0]}: leave one out"
        arguments.parser.error(f"argument --grid: it does not go {why}")
    if pictures and arguments.images is None:
        arguments.parser.error("argument --images: a vision transformer needs a folder of pictures")
    if pictures and (arguments.height is None) != (arguments.width is None):
        arguments.parser.error("argument --height: pictures need --height and --width, or neither")


def _of_prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SearchSettings` that say what a pipeline generates."""
    from visparse.head_search.settings import read_prompts
    from visparse.measure.settings import read_demo_settings

    beside = read_demo_settings(Path(arguments.model))
    prompts = read_prompts(arguments.prompts) if arguments.prompts else [beside["prompt"]] if "prompt" in beside else []
    if not prompts:
        arguments.parser.error("argument --prompts: the model has no demo with a prompt, so a file is needed")
    size = () if arguments.grid else ("height", "width", "num_frames")
    names = (*size, "guidance_scale", "negative_prompt")
    call = {name: beside[name] for name in names if name in beside}
    given = {"height": arguments.height, "width": arguments.width, "num_frames": arguments.frames}
    given["guidance_scale"] = arguments.guidance
    return {
        "prompts": tuple(prompts),
        "call": call | {name: value for name, value in given.items() if value is not None},
        "grid": arguments.grid,
        "steps": arguments.steps or beside.get("num_inference_steps"),
        "dense_steps": 0.25 if arguments.dense_steps is None else arguments.dense_steps,
    }


def _of_pictures(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same for a vision transformer, which has no steps."""
    return {"dense_steps": 0 if arguments.dense_steps is None else arguments.dense_steps}


def _pipeline(arguments: argparse.Namespace) -> Any:
    """The pipeline on its device."""
    from visparse.measure.generate import load_pipeline

    return load_pipeline(arguments.model, device=arguments.device, dtype=arguments.dtype)[0]


def _vision_transformer(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The model on its device, and the pictures as its inputs."""
    from visparse.head_search.images import runs_of
    from visparse.measure.generate import DTYPES, pick_device
    from visparse.timm_models import make_timm

    size = None if arguments.height is None else (arguments.height, arguments.width)
    device = pick_device(arguments.device)
    usual = "float32" if device.type == "cpu" else "bfloat16"
    model = make_timm(arguments.model, checkpoint=arguments.checkpoint, size=size)
    model.to(device, DTYPES[usual if arguments.dtype == "auto" else arguments.dtype])
    return model, runs_of(model, arguments.images, size)


def _rows(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _steps(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number of steps or a share such as 0.25, got {text!r}") from None


def _refresh(text: str) -> int | float | None:
    return None if text == "none" else _steps(text)


def _grid(text: str) -> tuple[int, int, int]:
    try:
        return triple(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"wanted frames, height and width such as 9x32x32, got {text!r}") from None


def _all_steps(text: str) -> tuple[int | float, ...]:
    return tuple(_steps(part) for part in _names(text))


def _all_refreshes(text: str) -> tuple[int | float | None, ...]:
    return tuple(_refresh(part) for part in _names(text))
