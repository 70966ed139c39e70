"""`visparse run`: dense and sparse from one seed, measured, with a page."""

from __future__ import annotations

import argparse
from typing import Any

from visparse.cli.options import add_generation_options, assignment, chosen, overrides_of


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        help="generate dense and sparse from one seed, measure time and quality, write a page",
        description="Generate the same video dense and with each plan, from one seed; print a table, write a page.",
    )
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="a diffusers pipeline: folder or hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--plan",
        action="append",
        metavar="NAME_OR_FILE",
        help="preset, plan file, or auto: the plan beside the model; may be given again (default radial)",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=assignment,
        default=[],
        metavar="[PLAN:]KEY=VALUE",
        help="override of one plan, or of all: --set dense_steps=2 --set neighborhood:window=[3,9,9]",
    )
    add_generation_options(parser)
    parser.set_defaults(run=main, parser=parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the comparison that the arguments describe."""
    plans = arguments.plan or ["radial"]
    for plan, key, _ in arguments.set:
        if plan is not None and plan not in plans:
            arguments.parser.error(f"argument --set: {plan}:{key}: no such --plan; given: {', '.join(plans)}")
    from pathlib import Path

    from visparse.cli.compare import run_and_show
    from visparse.measure.settings import PlanChoice, RunSettings, read_demo_settings

    beside = {key: value for key, value in read_demo_settings(Path(arguments.model)).items() if key != "plans"}
    settings = RunSettings(
        model=arguments.model,
        plans=tuple(PlanChoice(plan=plan, overrides=overrides_of(plan, arguments.set)) for plan in plans),
        **{**beside, **chosen(arguments)},
    )
    return run_and_show(settings, out=arguments.out, as_json=arguments.json)
