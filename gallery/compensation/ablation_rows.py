"""Run one row of the table: quality in batches, time at batch 1, and what follows from both."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

from ablation_cases import Case
from ablation_clips import Clips, Studio, Wish, quality, quiet_warnings
from ablation_curve import Point, psnr_at, share_from_which_it_wins, steps_for

import visparse
from visparse import Handle, SparsePlan
from visparse.measure.attention import RolledKeys
from visparse.measure.coverage import read_coverage
from visparse.presets import dense as dense_plan

Row = dict[str, Any]


class Runner:
    """Makes rows.

    Args:
        studio: the pipeline.
        wanted: the clips that are judged.
        steps: of a run.
        repeats: timed runs of one clip a row, after one that is not timed. 0: the time is that of the clips that are
            judged, which needs a batch of 1.
    """

    def __init__(self, studio: Studio, wanted: Sequence[Wish], steps: int, repeats: int) -> None:
        if repeats == 0 and studio.batch != 1:
            raise ValueError("repeats: wanted at least 1 where clips are made in batches, got 0; or use --batch 1")
        self.studio, self.wanted, self.steps, self.repeats = studio, wanted, steps, repeats
        self.reference: Clips | None = None

    def dense(self) -> Row:
        """The reference, and the share of a step that attention takes."""
        self.studio.make(self.wanted[:1], 2)  # not timed
        plan = dense_plan()
        row, made = self._measure("dense", "dense", plan, {}, self.steps)
        self.reference = made
        return row

    def floor(self) -> Row:
        """Dense again with keys and values rolled."""
        rolled = RolledKeys()
        row, _ = self._measure("floor", "dense again (floor)", None, {}, self.steps, rolled)
        if rolled.calls == 0:
            raise RuntimeError("floor: no call of scaled_dot_product_attention was seen, so nothing was rolled")
        return row

    def fewer(self, steps: int) -> Row:
        """Dense with fewer steps."""
        return self._measure("fewer-steps", f"dense, {steps} steps", None, {}, steps)[0]

    def case(self, case: Case) -> Row:
        """A sparse plan."""
        settings = {**self.studio.size.settings, **case.settings}
        row, _ = self._measure("sparse", case.name, case.plan, settings, self.steps)
        return {**row, "target": case.target, "static": case.static, "block_sizes": settings}

    def seconds_again(self) -> list[float]:
        """Times of the denoiser's steps in dense runs, now."""
        return self._timed(nullcontext(), self.steps)

    def psnr_of(self, plan: SparsePlan, wanted: Sequence[Wish], dense: Clips) -> float:
        """PSNR of a plan on other clips; dense are theirs."""
        with self._sparse(plan, self.studio.size.settings):
            return float(quality(self.studio.make(wanted, self.steps), dense)["psnr"])

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _measure(
        self,
        plan_name: str,
        label: str,
        plan: SparsePlan | None,
        settings: Mapping[str, int],
        steps: int,
        around: AbstractContextManager[Any] | None = None,
    ) -> tuple[Row, Clips]:
        reports: list[dict[str, Any]] = []
        after: list[dict[str, Any]] = []
        with quiet_warnings() as warned, self._sparse(plan, settings) as handle, around or nullcontext():
            note = None if handle is None else lambda: reports.append(handle.report().to_dict())
            after_batch = None if handle is None else lambda: after.append(handle.report().to_dict())
            made = self.studio.make(self.wanted, steps, before_last=note, after_batch=after_batch)
        last = after[-1] if after else None
        row: Row = {
            "plan": plan_name,
            "label": label,
            "model": "tiny_video",
            "dtype": self.studio.dtype,
            "steps": steps,
            "grid": list(self.studio.size.grid),
            "clips": len(self.wanted),
            "warnings": warned,
            "definition": None if plan is None else plan.to_dict(),
        }
        if last is not None:
            coverage = read_coverage(last)
            row |= {key: value for key, value in coverage.to_dict().items() if key != "grid"}
            kept = reports[0]["models"][0]["state_bytes"] if reports else None
            row["state_bytes_per_clip"] = None if kept is None else kept // min(self.studio.batch, len(self.wanted))
            row |= _by_overlap(after)
        if self.reference is not None:
            row |= quality(made, self.reference)
        return row | self._times(made, plan, settings, steps, around, last), made

    def _times(
        self,
        made: Clips,
        plan: SparsePlan | None,
        settings: Mapping[str, int],
        steps: int,
        around: AbstractContextManager[Any] | None,
        last: dict[str, Any] | None,
    ) -> Row:
        whole, denoise = list(made.seconds), list(made.seconds_denoise)
        if self.repeats:
            untouched = self.reference is None  # the dense run: `plan` only tells its share of attention
            with self._sparse(None if untouched else plan, settings), around or nullcontext():
                self.studio.make(self.wanted[:1], steps)
                runs = [self.studio.make(self.wanted[:1], steps) for _ in range(self.repeats)]
            whole, denoise = [run.seconds[0] for run in runs], [run.seconds_denoise[0] for run in runs]
            if plan is not None:
                with self._sparse(plan, {**settings, "timing": True}) as handle:
                    for _ in range(2):
                        self.studio.make(self.wanted[:1], steps)
                    last = None if handle is None else handle.report().to_dict()
        model = None if last is None else last["models"][0]
        again = {"refreshed_at_timed": list(model["refreshed_at"])} if model and model["overlaps"] else {}
        return {
            "repeats": len(whole),
            "seconds": median(whole),
            "seconds_denoise": median(denoise),
            "seconds_per_step": median(denoise) / steps,
            "seconds_denoise_all": denoise,
            "attention_seconds": None if model is None else model["attention_seconds"],
            "attention_share": None if model is None else model["attention_share"],
            **again,
        }

    def _timed(self, around: AbstractContextManager[Any], steps: int) -> list[float]:
        with around:
            return [self.studio.make(self.wanted[:1], steps).seconds_denoise[0] for _ in range(max(1, self.repeats))]

    def _sparse(self, plan: SparsePlan | None, settings: Mapping[str, Any]) -> AbstractContextManager[Handle | None]:
        return nullcontext(None) if plan is None else visparse.sparsify(self.studio.pipe, plan, **settings)


def _by_overlap(reports: Sequence[Mapping[str, Any]]) -> Row:
    """What the overlap decided: steps that were measured again and overlaps found, batch by batch."""
    models = [report["models"][0] for report in reports]
    if not any(model["overlaps"] for model in models):
        return {}
    return {
        "refreshed_at": [list(model["refreshed_at"]) for model in models],
        "overlaps": [{str(step): round(found, 4) for step, found in model["overlaps"].items()} for model in models],
    }


def judged(rows: Sequence[Row], steps: int) -> list[Row]:
    """The rows with what follows from all of them together.

    Adds to sparse rows `attention_cost` (time of all attention over that of the dense run), `rival_psnr` (dense with
    fewer steps at equal time), `beats_rival`, `equal_steps` (dense steps of equal quality) and
    `wins_from_attention_share`, by that cost and (`wins_from_attention_share_by_blocks`) by a cost that is exactly the
    share of blocks visited in the run; None where it cannot be said or the plan loses at any share.
    """
    curve = [Point(row["steps"], row["seconds_denoise"], row["psnr"]) for row in rows if row["plan"] == "fewer-steps"]
    dense = next((row for row in rows if row["plan"] == "dense"), None)
    return [_judged(row, dense, curve, steps) if row["plan"] == "sparse" else row for row in rows]


def _judged(row: Row, dense: Row | None, curve: list[Point], steps: int) -> Row:
    seconds = (row["attention_seconds"], dense["attention_seconds"]) if dense else (None, None)
    cost = seconds[0] / seconds[1] if seconds[0] and seconds[1] else None
    rival, equal = psnr_at(row["seconds_denoise"], curve), steps_for(row["psnr"], curve)
    slower = dense is not None and row["seconds_denoise"] >= dense["seconds_denoise"]
    return {
        **row,
        "attention_cost": cost,
        "rival_psnr": None if slower else rival,
        "beats_rival": False if slower else None if rival is None else row["psnr"] > rival,
        "equal_steps": equal,
        "wins_from_attention_share": _wins_from(cost, equal, steps),
        "wins_from_attention_share_by_blocks": _wins_from(row.get("run_block_density"), equal, steps),
    }


def _wins_from(cost: float | None, equal: float | None, steps: int) -> float | None:
    return None if cost is None or equal is None else share_from_which_it_wins(cost, equal, steps)


def run_all(
    jobs: Sequence[tuple[str, Callable[[], Row]]], after: Callable[[list[Row], list[str], list[str]], bool]
) -> list[Row]:
    """Run jobs in order. The first is the reference: where it fails, all does; any other failure is noted.

    Args:
        jobs: name and function of each.
        after: told the rows, the names that are left and the failures after each; False stops.
    """
    rows: list[Row] = []
    failed: list[str] = []
    for index, (name, job) in enumerate(jobs):
        try:
            rows.append(job())
        except (RuntimeError, ValueError) as error:
            if not rows:
                raise
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        if not after(rows, [left for left, _ in jobs[index + 1 :]], failed):
            break
    return rows
