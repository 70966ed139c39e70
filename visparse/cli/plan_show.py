"""`visparse plan show`: a plan as a person reads it, as text and as a picture."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visparse.cli.plan_options import PLAN_HELP, add_shape, read_plan


def add_parser(kinds: Any) -> None:
    """Add the subcommand."""
    parser = kinds.add_parser("show", help="patterns, who has which, what was measured; --png draws it")
    parser.add_argument("plan", metavar="PLAN", help=PLAN_HELP)
    add_shape(parser)
    parser.add_argument("--png", metavar="FILE", help="write the picture here: layers by heads, coloured by pattern")
    parser.set_defaults(run=show_plan)


def show_plan(arguments: argparse.Namespace) -> int:
    """Print a plan, and draw it where asked."""
    from visparse.plan_view import shape_for, view_plan
    from visparse.plan_view_text import plan_text

    plan = read_plan(arguments.plan)
    view = view_plan(plan, shape_for(plan, layers=arguments.layers, heads=arguments.heads))
    if arguments.png:
        from visparse.plan_view_picture import plan_picture

        plan_picture(view).save(arguments.png)
    if arguments.json:
        print(json.dumps({"schema": 1, **view.to_dict()}, indent=2))
        return 0
    print(plan_text(view))
    if arguments.png:
        print(f"\npicture: {arguments.png}")
    return 0
