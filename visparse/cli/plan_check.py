"""`visparse plan check`: whether a plan can be read, and fits a model, grids and a run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from visparse.cli.options import positive
from visparse.cli.patterns import triple
from visparse.cli.plan_options import PLAN_HELP, add_shape, read_plan

if TYPE_CHECKING:
    from visparse.plan import SparsePlan
    from visparse.rules import ModelFingerprint


def add_parser(kinds: Any) -> None:
    """Add the subcommand."""
    parser = kinds.add_parser("check", help="whether a plan is whole, and fits a model, grids and a number of steps")
    parser.add_argument("plan", metavar="PLAN", help=PLAN_HELP)
    parser.add_argument(
        "--model", metavar="FOLDER_OR_ID", help="a diffusers pipeline, or timm:NAME_OR_FOLDER; only configs are read"
    )
    add_shape(parser, head_dim=True)
    parser.add_argument("--model-class", metavar="NAME", help="class of the denoiser, such as WanTransformer3DModel")
    parser.add_argument(
        "--grid",
        type=triple,
        nargs="+",
        default=[],
        metavar="T,H,W",
        help="frames, height, width in tokens; default: the plan's own grids",
    )
    parser.add_argument("--steps", type=positive, default=50, metavar="N", help="steps of the run (default 50)")
    parser.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> int:
    """Print what was checked.

    Returns:
        Exit code 0: all is well.

    Raises:
        ValueError: something does not fit; the text says what, and why.
    """
    from visparse.plan import SCHEMA
    from visparse.plan_view_check import check_plan

    plan = read_plan(arguments.plan)
    models, notes = _models(plan, arguments)
    grids = arguments.grid or list(plan.grids or ([plan.made_for] if plan.made_for else []))
    checks = check_plan(plan, models, grids, arguments.steps)
    wrong = [f"{one.what}: {one.text}" for one in checks if not one.ok]
    notes += [] if grids else ["no grid was checked: the plan names none; give --grid"]
    if arguments.json:
        found = {"plan": plan.name, "ok": not wrong, "checks": [one.to_dict() for one in checks], "notes": notes}
        print(json.dumps({"schema": 1, **found}, indent=2))
    else:
        print(f"ok     file: plan {plan.name!r}, schema {SCHEMA}, size of its table of patterns: {len(plan.patterns)}")
        print("\n".join([*map(str, checks), *(f"note   {note}" for note in notes)]))
    if wrong:
        raise ValueError(f"{arguments.plan} does not pass: " + "; ".join(wrong))
    return 0


def _models(plan: SparsePlan, arguments: argparse.Namespace) -> tuple[list[ModelFingerprint], list[str]]:
    """Shapes to check the plan against, and what a reader should know about them."""
    from visparse.plan_view import DEFAULT_HEAD_DIM
    from visparse.rules import ModelFingerprint

    given = {name: getattr(arguments, name) for name in ("layers", "heads", "head_dim", "model_class")}
    asked = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if arguments.model is not None:
        if asked:
            raise ValueError(f"--model tells the whole shape, so it does not go with {', '.join(asked)}; leave one out")
        from visparse.plan_view_model import model_shapes

        return list(model_shapes(arguments.model).values()), []
    own = plan.model
    shape: dict[str, Any] = {name: value or getattr(own, name, None) for name, value in given.items()}
    shape["model_class"] = shape["model_class"] or "any"
    shape["head_dim"] = shape["head_dim"] or DEFAULT_HEAD_DIM
    if shape["layers"] is None or shape["heads"] is None:
        if asked:
            raise ValueError(f"plan {plan.name!r} is for any model; give --layers and --heads, or --model")
        return [], ["no model was checked: the plan is for any; give --model, or --layers and --heads"]
    notes = [] if asked else ["no other model was checked than the plan's own; give --model"]
    return [ModelFingerprint(**shape)], notes
