"""`visparse demo`: `run` on the model that ships with visparse."""

from __future__ import annotations

import argparse
from typing import Any

from visparse.cli.options import add_generation_options, chosen


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="the same on the small trained model that ships with visparse; needs no network",
        description="Compare dense and sparse on the small trained video model that ships with visparse.",
    )
    parser.add_argument("--prompt", metavar="TEXT", help='such as "an airplane, the camera pans left"')
    add_generation_options(parser)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    from visparse.cli.compare import run_and_show
    from visparse.measure.settings import FILE_NAME, RunSettings, read_demo_settings

    folder = shipped_model()
    shipped = read_demo_settings(folder)
    if not shipped.get("plans") or "prompt" not in shipped:
        raise ValueError(f"{folder / FILE_NAME}: wanted a prompt and plans; install visparse again")
    settings = RunSettings(model=str(folder), **{**shipped, **chosen(arguments)})
    return run_and_show(settings, out=arguments.out, as_json=arguments.json)


def shipped_model() -> Any:
    """Folder of the model that ships with visparse.

    Raises:
        ValueError: it is not in this installation.
    """
    try:
        from importlib import import_module

        folder = import_module("visparse_pipelines").tiny_video_path()
    except (ImportError, AttributeError):
        folder = None
    if folder is None or not (folder / "model_index.json").is_file():
        raise ValueError(
            "the model that ships with visparse is not in this installation; install the wheel, "
            "or use `visparse run --model FOLDER_OR_ID`"
        )
    return folder
