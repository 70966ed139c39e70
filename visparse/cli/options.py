"""Options that `run` and `demo` share, and how they become settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from visparse.measure.settings import COMPARISONS

_RENAMED = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
_PLAIN = ("prompt", "negative_prompt", "height", "width", "frames", "steps", "guidance", "seed", "fps")
_ALWAYS = ("compare", "repeats", "device", "dtype")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add everything but the model and the plans."""
    what = parser.add_argument_group("what to generate")
    what.add_argument("--negative-prompt", metavar="TEXT")
    what.add_argument("--height", type=positive, metavar="PIXELS")
    what.add_argument("--width", type=positive, metavar="PIXELS")
    what.add_argument("--frames", type=positive, metavar="N")
    what.add_argument("--steps", type=positive, metavar="N", help="denoiser steps")
    what.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; 1 is off")
    what.add_argument("--seed", type=int, metavar="N", help="of the noise, drawn on the CPU (default 0)")
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--compare",
        type=comparisons,
        default=COMPARISONS,
        metavar="LIST",
        help="what stands beside the plans (default dense,fewer-steps,floor): dense is always there; "
        "fewer-steps is dense in the time of the fastest plan; floor is dense again with other rounding",
    )
    how.add_argument(
        "--repeats", type=positive, default=1, metavar="N", help="runs of each; the median counts (default 1)"
    )
    how.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", metavar="DIR", help="folder for index.html and result.json (default visparse_out/NAME)")
    out.add_argument("--fps", type=float, metavar="N", help="frames a second on the page (default 8)")


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `RunSettings`: what was given, and the options that have a default of their own."""
    given = {_RENAMED.get(name, name): getattr(arguments, name, None) for name in _PLAIN}
    values = {name: value for name, value in given.items() if value is not None}
    return {**values, **{name: getattr(arguments, name) for name in _ALWAYS}}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text!r}")
    return value


def comparisons(text: str) -> tuple[str, ...]:
    """Names separated by commas, each one of `COMPARISONS`."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in COMPARISONS:
            raise argparse.ArgumentTypeError(f"wanted some of {','.join(COMPARISONS)}, got {name!r}")
    return names


def assignment(text: str) -> tuple[str | None, str, Any]:
    """One `[PLAN:]KEY=VALUE`: the plan or None, the key, the value (JSON where it is JSON, else text)."""
    left, sign, right = text.partition("=")
    plan, colon, key = left.rpartition(":")
    if not sign or not key.isidentifier() or (colon and not plan):
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE or PLAN:KEY=VALUE, got {text!r}")
    try:
        value = json.loads(right)
    except json.JSONDecodeError:
        value = right
    return plan or None, key, value


def overrides_of(plan: str, assignments: Sequence[tuple[str | None, str, Any]]) -> Mapping[str, Any]:
    """The overrides for one plan: those for all plans, then its own."""
    shared = {key: value for name, key, value in assignments if name is None}
    own = {key: value for name, key, value in assignments if name == plan}
    return {**shared, **own}


def blocks(text: str) -> tuple[int, int]:
    """Block sizes such as 128x64."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"wanted QUERIESxKEYS such as 128x64, got {text!r}")
    return int(sizes[0]), int(sizes[1])
