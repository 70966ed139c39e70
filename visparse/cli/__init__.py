"""The `visparse` command. Each subcommand is one file; torch and diffusers are imported only when one runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import visparse
from visparse.cli import bench, demo, env, patterns, plan, run, search


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        Exit code: 0 done, 1 failed (one line on standard error says why).

    Raises:
        SystemExit: code 2 on wrong usage, as argparse does.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("visparse: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.verbose or os.environ.get("VISPARSE_DEBUG", "0") != "0":
            traceback.print_exc()
        print(f"visparse {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="visparse",
        description="Sparse attention for diffusion transformers: make it faster, and see what that costs.",
        epilog="Set VISPARSE_DEBUG=1 to see tracebacks, VISPARSE_PROGRESS=0 to hide progress bars.",
    )
    parser.add_argument("--version", action="version", version=f"visparse {visparse.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (env, patterns, plan, demo, run, search, bench):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        command.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError))
    if expected and text:
        return text
    return f"{type(error).__name__}: {text} (set VISPARSE_DEBUG=1 for the traceback)"
