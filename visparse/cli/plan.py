"""`visparse plan`: show, compare, check, export and explain plans."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visparse.cli import plan_check, plan_diff, plan_export, plan_show
from visparse.cli.options import positive
from visparse.cli.patterns import triple
from visparse.cli.plan_options import PLAN_HELP, read_plan

_SIZES = ("layers", "heads", "head_dim")


def add_parser(commands: Any) -> None:
    """Add the subcommand with its own subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show a plan, compare two, check one for a model and grids, export it, explain a run",
        description="Plans of visparse: what they hold and what they do on a grid, without weights or a device.",
    )
    kinds = parser.add_subparsers(dest="plan_command", metavar="WHAT", required=True)
    for module in (plan_show, plan_diff, plan_check, plan_export):
        module.add_parser(kinds)
    _add_explain(kinds)
    for kind in kinds.choices.values():
        kind.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        kind.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object and nothing else"
        )


def _add_explain(kinds: Any) -> None:
    show = kinds.add_parser("explain", help="a table of the steps of a run, with block density and predicted time")
    show.add_argument("plan", metavar="PLAN", help=PLAN_HELP)
    show.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="frames, height, width in tokens")
    show.add_argument("--text", type=int, default=0, metavar="N", help="text tokens in front of the grid (default 0)")
    show.add_argument("--steps", type=positive, default=50, metavar="N", help="steps of the run (default 50)")
    for name in ("heads", "head-dim", "layers"):
        show.add_argument(f"--{name}", type=positive, metavar="N", help="default: as the plan's own model has it")
    show.add_argument("--device", default="cpu", help="cpu, a measured GPU such as h200, or cuda (default cpu)")
    show.set_defaults(run=explain_plan)


def explain_plan(arguments: argparse.Namespace) -> int:
    """Print what a plan will do."""
    from visparse.explain import explain
    from visparse.layout import Layout
    from visparse.rules import ModelFingerprint

    plan = read_plan(arguments.plan)
    sizes: dict[str, Any] = {name: getattr(arguments, name) or getattr(plan.model, name, None) for name in _SIZES}
    missing = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(f"plan {plan.name!r} is for any model; say which by {', '.join(missing)}")
    model = ModelFingerprint(model_class=plan.model.model_class if plan.model else "any", **sizes)
    layout = Layout(arguments.grid, before=arguments.text)
    found = explain(plan, model, layout, arguments.steps, device=arguments.device)
    print(json.dumps({"schema": 1, **found.to_dict()}, indent=2) if arguments.json else found)
    return 0
