"""Searched plans against single patterns on the model that ships, at equal measured time of attention.

    python gallery/search/compare.py --device cuda --grid long --prompts 2 --seeds 1 --out compare.json
    python gallery/search/compare.py --table compare.json
    python gallery/search/compare.py --table first.json second.json --out both.json

All plans have the same steps and dense steps. The search sees `--calibration` prompts, the choice of single patterns
and of their sizes two of these; the judged clips have other prompts and seeds. Every plan is tuned until a sparse step
takes about the wanted share of dense attention's time on calibration clips. The file is written after every row; what
did not fit into `--seconds` is listed there. Runs on the same device with the same clips and steps can be merged.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compensation"))  # its clips, rows and rival

from ablation_clips import SIZES, Size, wishes
from ablation_rows import Row, judged, run_all
from compare_arena import Arena, Stopwatch
from compare_jobs import Comparison, plain_ladders
from compare_merge import merged
from compare_picture import pareto_picture
from compare_singles import fill
from compare_table import table, verdicts

from visparse.estimate_rates import all_rates
from visparse.head_search.build import write_plan
from visparse.measure.generate import pick_device
from visparse.measure.results import Record

ELSEWHERE = {
    "tiny": (Size(9, 64, 96), Size(17, 64, 64)),
    "small": (Size(17, 192, 192), Size(33, 128, 128)),
    "long": (Size(33, 192, 192), Size(17, 256, 256)),
}
HEAD_DIM = 64  # of the model that ships
_JUDGING, _SCREENING = 0.85, 0.8  # of --seconds, for the search's judging and for trials of single patterns


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--grid", default="small", choices=SIZES, help="small: 9,216 tokens; long: 69,632; tiny: 1,280, for trials")
    add("--prompts", type=int, default=8)
    add("--seeds", type=int, default=1)
    add("--calibration", type=int, default=2, help="prompts that the search sees, at most 8; none is judged")
    add("--steps", type=int, default=12)
    add("--dense-steps", type=int, default=3, help="at the start of each sparse run")
    add("--targets", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="shares of dense attention's time")
    add("--fewer", help="numbers of steps of the rival, such as 4,6,8; default: every second one")
    add("--rows", type=int, default=12, help="tiles of queries that the search looks at")
    add("--judge", type=int, default=4, help="steps that the search looks at")
    add("--candidates", help="of the search: beginnings of names, such as near,tube; default: all")
    add("--minutes", type=float, help="of the search's scoring")
    add("--ranges", action="store_true", help="allocate each range of steps between measurements on its own")
    add("--weigh", type=int, default=8, help="groups of layers whose weight in the output is measured; 0: none")
    add(
        "--refine",
        type=int,
        nargs="+",
        default=[3],
        help="plans tried for the searched one of each target, the last number for all others: three ways to weigh, "
        "then climbing",
    )
    add("--no-probe", action="store_true", help="costs by rates alone")
    add("--only", default="", help="only rows (but the dense one) whose name this regular expression finds")
    add("--kinds", type=int, default=8, help="single patterns tried at all targets but the first: the best ones there")
    add("--only-kinds", help="of the single patterns, such as tube,disc; default: all")
    add("--tries", type=int, default=2, help="trials of each plan, to bring its measured time near the target")
    add("--transfer", action="store_true", help="also use the searched plans at another resolution and frame count")
    add("--workers", type=int, help="processes that look up the single patterns' costs")
    add("--seconds", type=float, default=1e9, help="begin no row after so many seconds")
    add("--out", type=Path, help="the JSON file to write")
    add("--png", type=Path, help="the picture to write")
    add("--plans", type=Path, help="folder for the plans that are judged")
    add("--table", type=Path, nargs="+", help="only print the table of these files, and write them as one to --out")
    args = parser.parse_args(arguments)
    if args.out is None and args.table is None:
        parser.error("wanted --out FILE, or --table FILE")
    if args.table is not None and args.out in args.table:
        parser.error(f"--out: wanted another file than those of --table, got {args.out}")
    if not 1 <= args.calibration <= 8:
        parser.error(f"--calibration: wanted 1 to 8 prompts, got {args.calibration}")
    if len(args.refine) > len(args.targets):
        parser.error(f"--refine: wanted a number for each of {len(args.targets)} targets at most, got {args.refine}")
    if not all(0 < target < 1 for target in args.targets):
        parser.error(f"--targets: wanted shares between 0 and 1, got {args.targets}")
    if args.dense_steps < 1 or args.steps < args.dense_steps + 3:
        parser.error(f"--steps: wanted at least --dense-steps + 3 and --dense-steps of at least 1, got {args.steps}")
    return args


class Command:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.begun = time.perf_counter()
        self.args = args
        gpu = pick_device(args.device).type == "cuda"
        size = SIZES[args.grid]._replace(blocks=None)
        workers = args.workers if args.workers is not None else (0 if gpu else max(0, (os.cpu_count() or 1) - 2))
        ladders = plain_ladders(size, HEAD_DIM, _rates(args.device), pick_device(args.device) if gpu else None)
        if args.only_kinds:
            ladders = [one for one in ladders if one.kind in args.only_kinds.split(",")]
        costs = fill(ladders, args.targets, workers)  # goes on while the pipeline is loaded and searched
        search: dict[str, Any] = {"rows": args.rows, "judge": args.judge, "minutes": args.minutes}
        search |= {"ranges": args.ranges, "weigh": args.weigh, "refine": max(args.refine), "probe": not args.no_probe}
        if args.candidates:
            search["candidates"] = tuple(args.candidates.split(","))
        self.wanted = wishes(args.prompts, args.seeds)
        self.arena = Arena(
            Stopwatch(size, args.device, 1),
            size,
            self.wanted,
            steps=args.steps,
            dense_steps=args.dense_steps,
            search=search,
            calibration=args.calibration,
            deadline=self.begun + _JUDGING * args.seconds,
        )
        self.comparison = Comparison(
            self.arena,
            costs,
            args.targets,
            kinds=args.kinds,
            tries=args.tries,
            refine=args.refine,
            in_time=self._screens,
        )
        self.settings: dict[str, Any] = {
            **{key: value for key, value in vars(args).items() if key not in ("out", "table", "png", "plans")},
            "pixels": list(size[:3]),
            "wishes": [list(wish) for wish in self.wanted],
            "notes": [
                "psnr, ssim: decoded frames in 8 bits against the dense run, mean over frames, then over clips",
                "measured_share: a sparse step (mean of those of a run; nothing waits within it) without what a dense "
                "one takes besides self-attention, over self-attention of a dense step, where each call is timed",
                "step_prediction_off: predicted minus measured time of a whole sparse step over the measured one; "
                "prediction_off: the same of attention alone",
                "seconds_denoise: median over the judged clips",
                "plans are tuned on the first two calibration clips until that share is near the target",
            ],
            "not_run": [],
            "failed": [],
        }

    def run(self) -> Record:
        """Run everything that fits into the time."""
        args = self.args
        if args.fewer:
            fewer = [int(n) for n in args.fewer.split(",")]
        else:
            fewer = list(range(max(2, args.dense_steps + 1), args.steps, 2))
        jobs = self.comparison.jobs(fewer, ELSEWHERE[args.grid] if args.transfer else ())
        jobs = [(name, make) for name, make in jobs if re.search(args.only, name)]
        rows = run_all([("dense", self._dense), *jobs], self._after)
        return self._write(rows)

    def _dense(self) -> Row:
        return self.arena.dense()

    def _in_time(self) -> bool:
        return bool(time.perf_counter() - self.begun < self.args.seconds)

    def _screens(self) -> bool:
        """Whether single patterns may still be tried: the best of them are judged after that."""
        return bool(time.perf_counter() - self.begun < _SCREENING * self.args.seconds)

    def _after(self, rows: list[Row], left: list[str], failed: list[str]) -> bool:
        self.settings |= {"not_run": left, "failed": failed, **self.comparison.notes}
        if "searched" in vars(self.arena):
            self.settings["search"] = self.arena.about()
        record = self._write(rows)
        row = record.rows[-1]
        print(
            f"{self.settings['spent_seconds']:7.1f} s  {len(rows)} rows, {len(failed)} failed; last: "
            f"{row['label']:50} {row.get('psnr', float('nan')):6.2f} dB  {row.get('measured_share') or 0:6.1%}",
            flush=True,
        )
        return self._in_time()

    def _write(self, rows: list[Row]) -> Record:
        self.settings["spent_seconds"] = round(time.perf_counter() - self.begun, 1)
        found = judged(rows, self.args.steps)
        self.settings["verdicts"] = verdicts(found)
        record = Record.collect("search", self.settings, found, device=str(self.arena.studio.device))
        record.write(self.args.out)
        if self.args.plans:
            for label, plan in self.comparison.plans.items():
                write_plan(plan, self.args.plans / f"{''.join(c if c.isalnum() else '_' for c in label)}.json")
        return record


def _rates(device: str) -> str:
    """Short name of a device among the measured rates."""
    import torch

    if pick_device(device).type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name()
    kinds = [rate.kind for rate in all_rates() if rate.device == name]
    if not kinds:
        raise ValueError(f"--device: attention was not measured on {name}; run on a device that was, or on the CPU")
    return kinds[0]


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    if args.table:
        record = merged({path.name: Record.read(path) for path in args.table})
        if args.out:
            record.write(args.out)
    else:
        record = Command(args).run()
    if args.png:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        title = f"tiny_video, {record.settings['grid']}, {record.device.get('name', '')}"
        pareto_picture(record.rows, title).save(args.png)
    print(table(record.rows, record.settings))
    if record.settings.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
