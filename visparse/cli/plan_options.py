"""What the subcommands of `visparse plan` share: reading a plan, the shape that it is looked at for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from visparse.cli.options import positive

if TYPE_CHECKING:
    from visparse.plan import SparsePlan

PLAN_HELP = "path of a plan file or its folder, or name of a preset"


def add_shape(parser: argparse.ArgumentParser, *, head_dim: bool = False) -> None:
    """Add `--layers` and `--heads`, and where asked `--head-dim`."""
    parser.add_argument("--layers", type=positive, metavar="N", help="default: as the plan's own model has it")
    parser.add_argument("--heads", type=positive, metavar="N", help="default: as the plan's own model has it")
    if head_dim:
        parser.add_argument(
            "--head-dim", type=positive, metavar="N", help="default: as the plan's own model has it, else 64"
        )


def read_plan(name: str) -> SparsePlan:
    """The plan that an argument means.

    Args:
        name: path or preset.

    Raises:
        ValueError: it is damaged or no plan; the text begins with the path.
        FileNotFoundError: no plan in the folder.
    """
    from pathlib import Path

    from visparse.presets import load_plan

    try:
        return load_plan(name)
    except ValueError as error:
        text = str(error).removeprefix("plan: ")
        raise ValueError(text if name in text or not Path(name).exists() else f"{name}: {text}") from error
