"""`visparse bench`: speed of kernels, of compiling lists, and of a denoiser step."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from typing import Any

from visparse.bench.cases import CASES, DEFAULT, PATTERNS, QUICK, find_case
from visparse.cli.options import blocks, positive

_SECONDS = {"cuda": 480, "cpu": 120}
_STEP = "visparse.bench.step_command"


def add_parser(commands: Any) -> None:
    """Add the subcommand with its own subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure speed: attention kernels beside their peers, compiling of lists, one denoiser step",
        description="Measure speed. Every contender is checked in the same run; a wrong one gets no speed.",
    )
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_kernels(kinds)
    _add_compile(kinds)
    if importlib.util.find_spec(_STEP) is not None:
        step = importlib.import_module(_STEP)
        step.add_step_parser(kinds)
        kinds.choices["step"].set_defaults(run=step.run_step)
    for kind in kinds.choices.values():
        kind.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        if not any("--json" in action.option_strings for action in kind._actions):
            kind.add_argument(
                "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object and nothing else"
            )


def _add_kernels(kinds: Any) -> None:
    parser = kinds.add_parser("kernels", help="attention of real shapes and patterns, beside every peer installed")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    _add_many(parser, "--case", f"may be given again; of {', '.join(case.name for case in CASES)}")
    _add_many(parser, "--pattern", f"may be given again (default: those of each case); of {', '.join(PATTERNS)}")
    _add_many(parser, "--contender", "may be given again (default: all); dense baselines are always measured")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16, on CPU float32")
    parser.add_argument("--blocks", type=blocks, metavar="QxK", help="block sizes of visparse (default: preferred)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="most rounds (default 20)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="bound on the command (default 480, CPU 120)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of inputs and orders (default 0)")
    parser.add_argument("--quick", action="store_true", help="the plain sequences only, 5 rounds")
    parser.add_argument("--out", metavar="FILE", help="write the record; after every pattern, so that nothing is lost")
    parser.set_defaults(run=run_kernels)


def _add_compile(kinds: Any) -> None:
    parser = kinds.add_parser("compile", help="seconds and memory of compiling patterns to block lists")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    _add_many(parser, "--case", "may be given again (default wan14b_720p and hunyuan_720p without text)")
    _add_many(parser, "--pattern", "may be given again (default radial, radial_code, gna, gna_strided, sta)")
    parser.add_argument("--blocks", type=blocks, metavar="QxK", help="block sizes (default: preferred)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="cold runs of each (default 3)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="bound on the command (default 480, CPU 120)")
    parser.add_argument("--out", metavar="FILE", help="write the record")
    parser.set_defaults(run=run_compile)


def run_kernels(arguments: argparse.Namespace) -> int:
    """Measure kernels; exit code 1 where an implementation of visparse was wrong."""
    from visparse.bench.contenders.registry import all_contenders, choose_contenders
    from visparse.bench.kernels import KernelSettings, bench_kernels
    from visparse.bench.patterns import check_pattern
    from visparse.bench.table import foot_text, group_text

    device = find_device(arguments.device)
    quick = arguments.quick
    names = arguments.case or (QUICK if quick else DEFAULT)[device]
    every = all_contenders()
    chosen = choose_contenders(every, arguments.contender) if arguments.contender else every
    settings = KernelSettings(
        device=device,
        dtype=arguments.dtype or ("bfloat16" if device == "cuda" else "float32"),
        cases=tuple(find_case(name) for name in names),
        patterns=tuple(check_pattern(name) for name in arguments.pattern) or None,
        unasked=not arguments.contender,
        blocks=arguments.blocks,
        repeats=arguments.repeats or (5 if quick else 20),
        seconds=arguments.seconds or _SECONDS[device],
        group_seconds=1.0 if quick else 2.0,
        seed=arguments.seed,
    )

    def listen(group: Any, so_far: Any) -> None:
        if arguments.out:
            so_far.write(arguments.out)
        if not arguments.json:
            print(group_text(group), end="\n\n", flush=True)

    record = bench_kernels(settings, [one for one in every if one in chosen or one.dense], listen)
    print(record.to_json() if arguments.json else foot_text(record.rows))
    if arguments.out:
        print(f"result: {record.write(arguments.out)}", file=sys.stderr)
    ours = [row for row in record.rows if str(row.get("contender")).startswith("visparse:")]
    return 1 if any("error" in row for row in ours) else 0


def run_compile(arguments: argparse.Namespace) -> int:
    """Measure the compiling of lists."""
    from visparse.bench.compile_lists import bench_compile, table_text

    device = find_device(arguments.device)
    record = bench_compile(
        device,
        cases=arguments.case,
        patterns=arguments.pattern,
        blocks=arguments.blocks,
        repeats=arguments.repeats,
        seconds=arguments.seconds or _SECONDS[device],
    )
    print(record.to_json() if arguments.json else table_text(record))
    if arguments.out:
        print(f"result: {record.write(arguments.out)}", file=sys.stderr)
    return 0


def find_device(name: str | None) -> str:
    """The device that is asked for, or CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device: wanted cuda, but PyTorch sees no CUDA device; use --device cpu")
    return name or ("cuda" if there else "cpu")


def _add_many(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, action="append", default=[], metavar="NAME", help=text)
