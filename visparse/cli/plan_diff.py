"""`visparse plan diff`: what differs between two plans."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visparse.cli.plan_options import PLAN_HELP, add_shape, read_plan


def add_parser(kinds: Any) -> None:
    """Add the subcommand."""
    parser = kinds.add_parser("diff", help="what differs between two plans, in words; exit code 1 if anything does")
    parser.add_argument("one", metavar="A", help=PLAN_HELP)
    parser.add_argument("other", metavar="B", help=PLAN_HELP)
    add_shape(parser)
    parser.set_defaults(run=diff_plans)


def diff_plans(arguments: argparse.Namespace) -> int:
    """Print what differs.

    Returns:
        Exit code: 0 the plans are equal, 1 they differ.
    """
    from visparse.plan_view import shape_for
    from visparse.plan_view_diff import plan_changes

    plans = read_plan(arguments.one), read_plan(arguments.other)
    shape = None
    if arguments.layers or arguments.heads:
        shape, _ = (shape_for(plan, layers=arguments.layers, heads=arguments.heads) for plan in plans)
    changes = plan_changes(*plans, shape)
    if arguments.json:
        print(json.dumps({"schema": 1, "equal": not changes, "changes": changes}, indent=2))
    else:
        print("\n".join(changes) or "the plans are equal")
    return 1 if changes else 0
