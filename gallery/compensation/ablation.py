"""What each compensation is worth: patterns x compensations x density x dense steps on the model that ships.

    python gallery/compensation/ablation.py --device cuda --out ablation.json
    python gallery/compensation/ablation.py --device cuda --out rest.json --without ablation.json
    python gallery/compensation/ablation.py --table ablation.json rest.json

Every row is compared with the dense run of the same prompt and seed. Beside the plans stand the floor (dense again, in
another order of addition) and the rival, dense with fewer steps. Quality is measured in batches, time on one clip at a
time. The file is written after every row; what did not fit into `--seconds` is listed there as `not_run`.

The prompts name two camera motions; every training caption names one or none, so none of them was trained on.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablation_cases import StaticChoice, all_cases, plan_of
from ablation_clips import SIZES, Studio, calibration_wishes, wishes
from ablation_merge import check_same, known_choices, merged
from ablation_rows import Row, Runner, judged, run_all
from ablation_static import FAMILIES, best, candidates
from ablation_table import table

from visparse.compensation import Proxies
from visparse.measure.generate import pick_device
from visparse.measure.results import Record
from visparse.patterns import Pattern


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    add(
        "--grid",
        default="small",
        choices=SIZES,
        help="small: 9,216 tokens; long: 69,632; tiny: 1,280 in small tiles, for trials",
    )
    add("--prompts", type=int, default=16)
    add("--seeds", type=int, default=2)
    add("--steps", type=int, default=12)
    add("--dense-steps", type=int, default=3, help="at the start of each sparse run")
    add("--densities", type=float, nargs="+", default=[0.125, 0.25], help="block densities of the sparse rows")
    add("--fewer", help="numbers of steps of the rival, such as 4,6,8; default: all from the dense steps on")
    add("--only", default="", help="only sparse rows whose name this regular expression finds")
    add("--without", type=Path, nargs="+", help="only sparse rows that these results lack, with their static patterns")
    add("--limit", type=int, help="only so many sparse rows, the most telling first")
    add("--batch", type=int, help="clips at a time; default 16 on a GPU, 1 on a CPU")
    add("--repeats", type=int, help="timed runs a row; default 3 on a GPU; 0 on a CPU: the judged clips are timed")
    add("--calibrate", type=int, help="static patterns tried for each density; default 4 on a GPU, 1 (none) on a CPU")
    add("--seconds", type=float, default=1e9, help="begin no row after so many seconds")
    add("--out", type=Path, help="the JSON file to write")
    add(
        "--table", type=Path, nargs="+", help="run nothing, print one table of these files; --out: write it as one file"
    )
    args = parser.parse_args(arguments)
    if args.out is None and args.table is None:
        parser.error("wanted --out FILE, --table FILE or both")
    if not all(0 < density < 1 for density in args.densities):
        parser.error(f"--densities: wanted shares between 0 and 1, got {args.densities}")
    if args.dense_steps < 1 or args.steps < args.dense_steps + 3:
        parser.error(f"--steps: wanted at least --dense-steps + 3 and --dense-steps of at least 1, got {args.steps}")
    return args


class Ablation:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.begun = time.perf_counter()
        self.args = args
        gpu = pick_device(args.device).type == "cuda"
        batch = args.batch or (16 if gpu else 1)
        repeats = args.repeats if args.repeats is not None else (3 if gpu else 0)
        self.tries = args.calibrate or (4 if gpu else 1)
        self.studio = Studio(SIZES[args.grid], args.device, batch)
        self.wanted = wishes(args.prompts, args.seeds)
        self.runner = Runner(self.studio, self.wanted, args.steps, repeats)
        self.settings: dict[str, Any] = {
            **{key: value for key, value in vars(args).items() if key not in ("out", "table", "without")},
            "without": [path.name for path in args.without or ()],
            "batch": batch,
            "repeats": repeats,
            "calibrate": self.tries,
            "pixels": list(self.studio.size[:3]),
            "wishes": [list(wish) for wish in self.wanted],
            "floor": "keys and values rolled by about half their number: exact, with another order of addition",
            "notes": [
                "psnr, ssim: decoded frames in 8 bits against the dense run, mean over frames, then over clips",
                "seconds: one clip, text and decoding counted; seconds_denoise: its steps only, as the rival's",
                "attention_seconds: all self-attention of one clip's run, choosing and measuring counted; on a GPU the "
                "device is waited for at each call",
            ],
            "static": [],
            "not_run": [],
            "failed": [],
        }
        self.record: Record | None = None
        self.earlier = read_all(args.without) if args.without else None
        if self.earlier is not None:
            check_same(self.settings, self.earlier.settings, "--without")

    def static_choices(self) -> list[StaticChoice]:
        """The best static patterns, by clips that are not judged; those of earlier results where they have some."""
        args, device, size = self.args, self.studio.device, self.studio.size
        known = [] if self.earlier is None else self.earlier.settings["static"]
        targets = [target for target in args.densities if not any(entry["target"] == target for entry in known)]
        chosen = [one for target in args.densities for one in known_choices(known, target)]
        self.settings["static"] += [entry for entry in known if entry["target"] in args.densities]
        dense = self.studio.make(calibration_wishes(), args.steps) if self.tries > 1 and targets else None

        def judge(proxies: Proxies | None) -> Callable[[Pattern], float]:
            def psnr(pattern: Pattern) -> float:
                if dense is None:
                    raise RuntimeError("nothing is compared where one pattern is tried")
                return self.runner.psnr_of(plan_of(pattern, args.dense_steps, proxies), calibration_wishes(), dense)

            return psnr

        for target in targets:
            for family in FAMILIES:
                taken = []
                for proxies in (None, Proxies()):
                    found = candidates(
                        family, size.grid, target, tiled=proxies is not None, device=device, blocks=size.blocks
                    )[: self.tries]
                    one, values = best(found, judge(proxies), self.tries)
                    taken.append(one.pattern)
                    self.settings["static"].append(
                        {
                            "family": family,
                            "target": target,
                            "with": "own masks" if proxies is None else "whole tiles and proxies",
                            "pattern": one.pattern.to_dict(),
                            "block_density": one.density,
                            "tried": [[str(other.pattern), other.density] for other in found],
                            "calibration_psnr": values,
                        }
                    )
                chosen.append(StaticChoice(family, target, *taken))
        return chosen

    def run(self) -> Record:
        """Run everything that fits into the time."""
        args, runner = self.args, self.runner
        cases = all_cases(self.static_choices(), args.densities, args.steps, args.dense_steps)
        have = set() if self.earlier is None else {row["label"] for row in self.earlier.rows}
        cases = [case for case in cases if re.search(args.only, case.name) and case.name not in have][: args.limit]
        fewer = [int(n) for n in args.fewer.split(",")] if args.fewer else range(max(2, args.dense_steps), args.steps)
        jobs: list[tuple[str, Callable[[], Row]]] = [("dense", runner.dense), ("floor", runner.floor)]
        jobs += [(f"dense, {n} steps", lambda n=n: runner.fewer(n)) for n in fewer]  # type: ignore[misc]
        jobs += [(case.name, lambda case=case: runner.case(case)) for case in cases]  # type: ignore[misc]
        rows = run_all(jobs, self._write)
        self.settings["dense_seconds_at_end"] = runner.seconds_again()
        self._write(rows, self.settings["not_run"], self.settings["failed"])
        assert self.record is not None
        return self.record

    def _write(self, rows: list[Row], left: list[str], failed: list[str]) -> bool:
        """Write the file; False where the time is over."""
        spent = time.perf_counter() - self.begun
        self.settings |= {"not_run": left, "failed": failed, "spent_seconds": round(spent, 1)}
        kinds = judged(rows, self.args.steps)
        self.record = Record.collect("quality", self.settings, kinds, device=str(self.studio.device))
        self.record.write(self.args.out)
        row = kinds[-1]
        psnr = row.get("psnr", float("nan"))
        print(
            f"{spent:7.1f} s  {len(rows)} rows, {len(failed)} failed; last: {row['label']:58} {psnr:6.2f} dB",
            flush=True,
        )
        return spent < self.args.seconds


def read_all(paths: Sequence[Path]) -> Record:
    """Several files as one record."""
    return merged({str(path): Record.read(path) for path in paths})


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    record = read_all(args.table) if args.table else Ablation(args).run()
    if args.table and args.out:
        record.write(args.out)
    print(table(record.rows, record.settings))
    if record.settings.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
