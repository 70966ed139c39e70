"""One size of clips: its dense reference, its timing, its search, and trials on a calibration clip."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, median
from typing import Any

from ablation_cases import Case
from ablation_clips import Clips, Size, Studio, Wish, calibration_wishes, quality
from ablation_rows import Row, Runner
from compare_searched import Offer, Searched

import visparse
from visparse import SparsePlan
from visparse.adapter import find_denoisers
from visparse.head_search.settings import SearchSettings
from visparse.presets import dense as dense_plan
from visparse.session import session_of

NEAR = 0.03  # of the time that is wanted
TRIED = 2  # clips of a trial


class Stopwatch(Studio):
    """A studio that keeps the times of the steps of the last clips.

    Attributes:
        steps: seconds of each step, of each clip (or batch of them).
    """

    steps: tuple[tuple[float, ...], ...] = ()

    def make(self, wanted: Sequence[Wish], steps: int, **hooks: Callable[[], None] | None) -> Clips:
        """Make clips; see `Studio.make`."""
        made = super().make(wanted, steps, **hooks)
        self.steps = made.seconds_of_steps
        return made

    def seconds_at(self, places: Sequence[int]) -> float:
        """Mean over some steps of the last clips, each the median over the clips.

        Not the median over all: where the ranges of a plan differ, that is the time of one range.
        """
        return mean(median(clip[place] for clip in self.steps) for place in places)

    def attention_seconds(self) -> float:
        """Self-attention of all layers in a dense step of the last run, which was sparsified with `timing`."""
        module, _ = next(iter(find_denoisers(self.pipe).values()))
        session = session_of(module)
        if session is None:
            raise RuntimeError("studio: wanted the time of self-attention, and none was taken")
        return sum(route.stats.dense_seconds / max(route.stats.dense, 1) for route in session.router.routes)


@dataclass(frozen=True)
class Trial:
    """A plan on the first two calibration clips.

    Args:
        offer: the plan.
        share: measured time of attention in a sparse step over that of a dense one.
        psnr: in dB, mean over the clips.
    """

    offer: Offer
    share: float
    psnr: float

    def to_dict(self) -> dict[str, float]:
        """The figures."""
        return {"predicted_share": self.offer.share, "measured_share": self.share, "psnr": self.psnr}


class Arena:
    """One size of clips.

    Args:
        studio: the pipeline; its size is set before each run.
        size: of the clips.
        wanted: the clips that are judged.
        steps, dense_steps: of a run, and at its start.
        search: further settings of the search.
        calibration: number of clips that the search sees.
        deadline: of the search's judging, on `time.perf_counter`; None: none.
    """

    def __init__(
        self,
        studio: Stopwatch,
        size: Size,
        wanted: Sequence[Wish],
        *,
        steps: int,
        dense_steps: int,
        search: dict[str, Any],
        calibration: int = 2,
        deadline: float | None = None,
    ) -> None:
        self.studio, self.size, self.wanted = studio, size, list(wanted)
        self.steps, self.dense_steps, self.options = steps, dense_steps, search
        self.wishes, self.deadline = calibration_wishes(calibration), deadline
        self.runner = Runner(studio, self.wanted, steps, repeats=0)

    @cached_property
    def calibration(self) -> tuple[Clips, float, float]:
        """The clips of trials in dense attention; seconds of self-attention in a dense step, and of all else."""
        self.enter()
        first = self.wishes[:1]
        with visparse.sparsify(self.studio.pipe, dense_plan(), timing=True) as handle:
            self.studio.make(first, 3)
            self.studio.make(first, 6)
            attention = self.studio.attention_seconds()
            handle.restore()
        self.studio.make(first, 3)
        made = self.studio.make(self.wishes[:TRIED], self.steps)
        whole = self.studio.seconds_at(range(1, self.steps))
        return made, attention, max(0.0, whole - attention)

    @cached_property
    def searched(self) -> Searched:
        """The search on the calibration clips."""
        self.enter()
        wishes, size = self.wishes, self.size
        call = {"num_frames": size.num_frames, "height": size.height, "width": size.width, "guidance_scale": 1.0}
        return Searched(
            self.studio.pipe,
            SearchSettings(
                prompts=tuple(wish.prompt for wish in wishes),
                call=call,
                steps=self.steps,
                attention=0.5,
                dense_steps=self.dense_steps,
                seed=wishes[0].seed,
                **self.options,
            ),
            self.deadline,
        )

    def trial(self, offer: Offer) -> Trial:
        """Run a plan on the first calibration clips, after a run that is not timed, which compiles all kernels."""
        dense, seconds, _ = self.calibration
        self.enter()
        with visparse.sparsify(self.studio.pipe, offer.plan):
            self.studio.make(self.wishes[:1], self.steps)
            made = self.studio.make(self.wishes[:TRIED], self.steps)
        return Trial(offer, self._seconds(offer.plan) / seconds, float(quality(made, dense)["psnr"]))

    def tuned(
        self, offers: Callable[[float], Offer], share: float, tries: int, aim: float | None = None
    ) -> list[Trial]:
        """Trials of plans whose measured time comes near a share of dense attention's, the best one first.

        The first plan is the one predicted to cost that share; each next one is asked for by what the last ones took.

        Args:
            offers: the plan for a predicted share; ValueError where there is none.
            share: of dense attention's time in a sparse step.
            tries: most trials.
            aim: predicted share of the first plan; None: `share`.

        Raises:
            ValueError: there is no plan for the share itself.
        """
        trials: list[Trial] = []
        aim = share if aim is None else aim
        for number in range(tries):
            try:
                offer = offers(aim)
            except ValueError:
                if number == 0:
                    raise
                break
            if any(offer.plan == one.offer.plan for one in trials):
                break
            trials.append(self.trial(offer))
            if 1 - NEAR <= trials[-1].share / share <= 1 + NEAR / 2:
                break
            aim = _next_aim(trials, share)
        return sorted(trials, key=lambda one: rank(one, share))

    def row(self, label: str, trial: Trial, target: float | None, **more: Any) -> Row:
        """Judge a plan on the held-out clips.

        Args:
            label: of the row.
            trial: of the plan.
            target: share of dense attention's time that was wanted.
            more: columns to add.
        """
        self.enter()
        plan = trial.offer.plan
        row = self.runner.case(Case(name=label, target=target, plan=plan))
        _, dense, besides = self.calibration
        predicted, seconds = trial.offer.milliseconds, self._seconds(plan)
        whole = sum(self.studio.seconds_at([step]) - besides for step in range(self.steps))
        return row | {
            "predicted_share": trial.offer.share,
            "measured_share": seconds / dense,
            "predicted_step_milliseconds": predicted,
            "measured_step_milliseconds": 1000 * seconds,
            "step_milliseconds": 1000 * (seconds + besides),
            "attention_seconds": whole,
            "prediction_off": None if predicted is None else predicted / (1000 * seconds) - 1,
            "step_prediction_off": None if predicted is None else (predicted / 1000 - seconds) / (seconds + besides),
            "predicted_error": trial.offer.error,
            "calibration": trial.to_dict(),
            "size": {key: value for key, value in self.size._asdict().items() if key != "blocks"},
            **more,
        }

    def dense(self) -> Row:
        """The reference of the clips that are judged, with the time of attention."""
        _, attention, besides = self.calibration
        self.enter()
        return self.runner.dense() | {
            "measured_step_milliseconds": 1000 * attention,
            "step_milliseconds": 1000 * (attention + besides),
            "measured_share": 1.0,
            "attention_seconds": attention * self.steps,
        }

    def enter(self) -> None:
        """The studio makes clips of this size from now on."""
        self.studio.size = self.size

    def about(self) -> dict[str, Any]:
        """What the search was, for the settings of a record."""
        one = self.searched
        return {
            "seconds": {**one.seconds, "all": sum(one.seconds.values())},
            "settings": {k: v for k, v in asdict(one.settings).items() if k not in ("patterns", "work", "call")},
            "candidates": [[c.family, c.name] for c in one.ready.candidates.kept],
            "rates": one.ready.costs.source,
            "reasons": {str(layer): why for layer, why in one.reasons.items()},
            "climbs": one.climbs,
            **one.known_weights(),
        }

    def _seconds(self, plan: SparsePlan) -> float:
        """Seconds of attention in a sparse step of the last clips: the step without what a dense one takes besides."""
        table = plan.timetable(self.steps)
        sparse = [step for step in range(self.steps) if not table.is_dense(step)]
        return max(1e-9, self.studio.seconds_at(sparse) - self.calibration[2])


def _next_aim(trials: Sequence[Trial], share: float) -> float:
    """What to ask for next: costs miss the same at any size by one trial, along a line by two."""
    last, slope = trials[-1], 1.0
    if len(trials) > 1 and trials[-2].offer.share != last.offer.share:
        slope = (last.share - trials[-2].share) / (last.offer.share - trials[-2].offer.share)
    return last.offer.share + (share - last.share) / min(max(slope, 0.5), 2.0)


def rank(trial: Trial, share: float) -> tuple[bool, float]:
    """Order of trials: those within the time by PSNR, then the others by time."""
    late = trial.share > share * (1 + NEAR)
    return late, trial.share if late else -trial.psnr
