"""`visparse plan export`: a plan with everything resolved for one grid, as a plan file or as CSV."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visparse.cli.patterns import triple
from visparse.cli.plan_options import PLAN_HELP, add_shape, read_plan


def add_parser(kinds: Any) -> None:
    """Add the subcommand."""
    parser = kinds.add_parser("export", help="the plan with all lengths in tokens of one grid, for eyes and programs")
    parser.add_argument("plan", metavar="PLAN", help=PLAN_HELP)
    parser.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="frames, height, width in tokens")
    parser.add_argument("--out", metavar="FILE", help="write here (default: standard output)")
    parser.add_argument(
        "--format", choices=("json", "csv"), default="json", help="json: a plan file; csv: a row for each head"
    )
    add_shape(parser, head_dim=True)
    parser.set_defaults(run=export_plan)


def export_plan(arguments: argparse.Namespace) -> int:
    """Write or print the resolved plan."""
    if arguments.json and arguments.format == "csv":
        raise ValueError("--json and --format csv ask for two forms on one output; leave one out")
    text = _as_csv(arguments) if arguments.format == "csv" else _as_json(arguments)
    if arguments.out is None or arguments.json:
        print(text, end="")
    if arguments.out is not None:
        from pathlib import Path

        Path(arguments.out).write_text(text, encoding="utf-8")
        if not arguments.json:
            print(f"written: {arguments.out}")
    return 0


def _as_json(arguments: argparse.Namespace) -> str:
    from visparse.plan_view_export import resolved_plan

    return json.dumps(resolved_plan(read_plan(arguments.plan), arguments.grid).to_dict(), indent=2) + "\n"


def _as_csv(arguments: argparse.Namespace) -> str:
    from visparse.plan_view import shape_for
    from visparse.plan_view_export import assignment_rows, rows_csv

    plan = read_plan(arguments.plan)
    shape = shape_for(plan, layers=arguments.layers, heads=arguments.heads, head_dim=arguments.head_dim)
    if shape is None:
        raise ValueError(f"plan {plan.name!r} is for any model; say for which by --layers and --heads")
    return rows_csv(assignment_rows(plan, shape, arguments.grid))
