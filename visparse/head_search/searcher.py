"""Searcher: one search, from the first look at the model to the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from visparse.adapter import find_denoisers, unwrapped
from visparse.devices import execution_device
from visparse.head_search.candidates import make_candidates
from visparse.head_search.capture import (
    Calibration,
    OutOfTimeError,
    Watch,
    captured,
    run_denoiser,
    run_pipeline,
)
from visparse.head_search.choose import Chosen, Table
from visparse.head_search.costs import Costs, make_costs
from visparse.head_search.identity import identity_of
from visparse.head_search.outlook import Outlook
from visparse.head_search.pixels import call_for, check_grid
from visparse.head_search.probe import STEPS, Bench, Line, corrected, probe
from visparse.head_search.ready import Ready
from visparse.head_search.record import Recorder
from visparse.head_search.refining import refined
from visparse.head_search.schedule import Schedule, calibrate, make_schedule
from visparse.head_search.score import Scorer
from visparse.head_search.settings import SearchSettings
from visparse.head_search.shard import gather_scores, processes
from visparse.head_search.work import WorkFile
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.run import Progress

_USELESS = 0.9  # relative error of attention that is no better than no attention


class Searcher:
    """One search on one pipeline or denoiser."""

    def __init__(
        self,
        target: Any,
        settings: SearchSettings,
        *,
        inputs: Sequence[Sequence[Any]] = (),
        timed: Sequence[Any] | None = None,
        timer: Callable[[], float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Look at the model, and open the work file.

        Args:
            target: a diffusers pipeline or a denoiser.
            settings: what to do.
            inputs: of a bare denoiser: for each run the keyword arguments of each step.
            timed: a run of the same form, such as a larger batch on the same grid, by which times are measured; scores
                come from `inputs`. None: the first of `inputs`.
            timer: gives the seconds of a timed call as the target is now; None: the probe times calls itself.
            progress: told about every step.

        Raises:
            ValueError: inputs, the timed run and the target do not go together, refine of a bare denoiser, or the work
                file is of another search.
        """
        if settings.grid is not None:
            settings = replace(settings, call=call_for(target, settings.grid, settings.call))
        self.target, self.settings, self.progress = target, settings, progress or Progress()
        denoisers = find_denoisers(target)
        module, adapter = next(iter(denoisers.values()))
        self.model = adapter.fingerprint(unwrapped(module))
        self.device = execution_device(module)
        self.inputs = [list(run) for run in inputs]
        if isinstance(target, nn.Module) != bool(self.inputs):
            raise ValueError(
                "inputs: wanted them for a bare denoiser, and only for one: a list of runs, each a list with the "
                "keyword arguments of every step; a pipeline gets prompts"
            )
        steps = len(self.inputs[0]) if self.inputs else 0
        if timed is not None and (not steps or len(timed) != steps):
            raise ValueError(
                f"timed: wanted a run of as many steps as those of inputs, {steps}, got {len(timed)}; leave it out to "
                "time what is scored"
            )
        self.timed, self.timer = None if timed is None else list(timed), timer
        if settings.refine and self.inputs and adapter.timestep is not None:
            raise ValueError(
                "refine: wanted a pipeline or a vision transformer, whose output can be judged, got a bare denoiser; "
                "leave it out"
            )
        self.total = self._steps()
        self._begun = time.perf_counter()
        self.rank, self.world = processes()
        path = settings.work
        if path is not None and self.world > 1:
            path = path.with_name(f"{path.name}.{self.rank}")
        self.work = WorkFile(path, {**identity_of(self, unwrapped(module)), "rank": [self.rank, self.world]})

    @property
    def runs(self) -> int:
        """Calibration runs of all processes."""
        return len(self.inputs) or max(len(self.settings.prompts), 1)

    def prepare(self) -> Ready:
        """Find the grid and attention's share of a step, list candidates with their costs, refuse what cannot be.

        Raises:
            ValueError: the goal is beyond the ceiling, or the device was not measured.
        """
        self._look()
        facts, settings = self.work.facts, self.settings
        grid, before, after = facts["layout"]
        check_grid(settings.grid, (grid[0], grid[1], grid[2]), settings.call)
        layout = Layout((grid[0], grid[1], grid[2]), before, after)
        own = self.device.type if self.device.index is None else f"{self.device.type}:{self.device.index}"
        share = facts["share"] if settings.share is None else settings.share
        if settings.speedup is not None and settings.share is None and settings.rates not in (None, own):
            raise ValueError(
                f"speedup: attention's share of a step was measured on {own}, the rates are of {settings.rates!r}; "
                "give its share there by share=..., or a goal such as attention=0.25"
            )
        schedules = {
            family: make_schedule(family, self.total, settings.dense_steps, settings.refresh, ranges=settings.ranges)
            for family in settings.families
        }
        targets = self._targets(schedules, share)
        candidates = make_candidates(
            layout,
            settings.families,  # also those beyond this goal: another goal uses the same scores
            names=settings.candidates,
            patterns=settings.patterns,
            refresh=settings.refresh,
            per_tile=settings.per_tile,
            blocks=settings.blocks,
        )
        ready = Ready(
            layout=layout,
            share=share,
            step_seconds=facts["step_seconds"],
            candidates=candidates,
            costs=make_costs(
                candidates.kept,
                layout,
                self.model.head_dim,
                settings.rates or own,
                counted_on=self.device,
                per_tile=settings.per_tile,
                blocks=settings.blocks,
            ),
            schedules=schedules,
            targets=targets,
        )
        measured = settings.probe and settings.rates in (None, own)
        return replace(ready, costs=self._probed(ready)) if measured else ready

    def outlook(self) -> Outlook:
        """What a search would do and take: one step of scoring is tried, nothing is kept."""
        ready = self.prepare()
        steps = min(2, self.total)
        tried = Calibration(total=steps, measure=frozenset(range(steps - 1)), judge=frozenset({steps - 1}))
        watch = Watch(tried, self._scorer(ready), WorkFile(None, {}))
        self._run(watch, 0, steps=steps)
        calibration = self._calibration(ready)
        busy = len(calibration.judge) + len(calibration.measure)
        runs = -(-self.runs // self.world)
        dense = ready.step_seconds * watch.batch / max(self.work.facts["batch"], 1)  # of a run that is scored
        return Outlook(
            model=self.model,
            ready_layout=ready.layout,
            share=ready.share,
            candidates=ready.candidates,
            costs=ready.costs,
            ceilings={name: one.ceiling(ready.share or 0.5) for name, one in ready.schedules.items()},
            targets=ready.targets,
            judge=tuple(sorted(calibration.judge)),
            measure=tuple(sorted(calibration.measure)),
            total=self.total,
            runs=self.runs,
            seconds=runs * (self.total * dense + busy * watch.scoring_seconds / steps),
        )

    def search(self) -> SparsePlan:
        """Score what has not been scored yet, and choose.

        Raises:
            ValueError: see `prepare`; or the budget is too small, or the time was over before a layer was scored.
        """
        ready = self.prepare()
        reasons = self.score(ready)
        scores = gather_scores(self.work.scores, self.world)
        if not scores:
            why = "; ".join(sorted(set(reasons.values()))) or "the time was over before one layer was scored"
            raise ValueError(f"search: nothing was scored ({why}); give it more minutes")
        table = Table(scores, ready.candidates, ready.costs, ready.schedules)
        recorder = Recorder(self, ready, reasons, {(key[0], key[1]) for key in scores})
        if self.settings.refine:
            return refined(self, table, ready, recorder)
        return recorder.plan(self.choose(table, ready))

    def score(self, ready: Ready) -> dict[int, str]:
        """Run the calibration prompts of this process.

        Returns:
            Layers that could not be scored, and why.
        """
        mine = [run for run in range(self.runs) if run % self.world == self.rank and run not in self.work.done]
        self.progress.expect(len(mine) * self.total)
        watch = Watch(self._calibration(ready), self._scorer(ready), self.work)
        watch.tick = self.progress.tick
        watch.deadline = self.deadline
        try:
            for run in mine:
                self.progress.start(f"run {run + 1} of {self.runs}")
                self._run(watch, run, steps=self.total)
                if self.timed is not None and watch.layout != ready.layout:
                    raise ValueError(
                        f"timed: wanted a run on the grid of inputs, {watch.layout}, got {ready.layout}; its times say "
                        "nothing of other grids"
                    )
                self.work.finish(run)
        except OutOfTimeError:
            watch.reasons.setdefault(-1, "the time for the search was over; what was not scored stays dense")
        return watch.reasons

    def choose(self, table: Table, ready: Ready) -> Chosen:
        """The best allocation, by predicted error, or by predicted time where the goal is an error."""
        settings, layers = self.settings, self.model.layers
        if settings.rule == "sparse-vdit":
            return table.by_paper(layers, limit=settings.limit)
        found, refused = [], []
        for family, attention in ready.targets.items():
            try:
                found.append(
                    table.by_budget(
                        family, layers, attention=attention, density=settings.density, max_error=settings.max_error
                    )
                )
            except ValueError as error:
                refused.append(error)
        if not found:
            raise refused[0]
        best = min(found, key=lambda one: one.milliseconds if settings.max_error is not None else one.error)
        if best.error >= _USELESS:
            raise ValueError(
                f"{settings.goal}: the best plan within {getattr(settings, settings.goal)} has a predicted error of "
                f"{best.error:.0%} of attention's output, about as much as skipping it all; ask for less"
            )
        return best

    def generate(self, run: int, steps: int | None = None, *, decode: bool = False) -> Any:
        """Run the pipeline on a calibration prompt, or a vision transformer on a calibration picture.

        Args:
            run: number of the prompt or picture.
            steps: denoiser steps; None: those of a run.
            decode: whether frames or pictures are wanted.
        """
        if self.inputs:
            with torch.no_grad():
                return self.target(**self.inputs[run][0])
        prompts = self.settings.prompts
        arguments = {**self.settings.call, **({"prompt": prompts[run]} if prompts else {})}
        return run_pipeline(self.target, arguments, steps or self.total, self.settings.seed + run, decode=decode)

    @property
    def deadline(self) -> float | None:
        """When the search should be over, on `time.perf_counter`; None: no limit."""
        minutes = self.settings.minutes
        return None if minutes is None else self._begun + 60 * minutes

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Run one or two dense steps: the grid, attention's share, and its time.

        The first call of a model sets libraries up, compiles, and gets memory, which may take longer than all the rest.
        Of two steps the first is not timed; a single step is run once before.
        """
        if self.work.facts:
            return
        steps = min(2, self.total)
        if steps == 1:
            self._run(Watch(Calibration(total=1), None, None), 0, steps=1, inputs=self.timed)
        watch = Watch(Calibration(total=steps), None, None)
        self._run(watch, 0, steps=steps, inputs=self.timed)
        if watch.layout is None:
            raise ValueError("target: its denoiser was not called; nothing can be searched")
        attention, calls = watch.attention.seconds, max(watch.attention.calls, 1)
        share = attention / watch.denoiser_seconds if watch.denoiser_seconds else 0.0
        layout = watch.layout
        self.work.note(
            {
                "layout": [list(layout.grid), layout.before, layout.after],
                "share": min(share, 0.9999),
                "step_seconds": watch.denoiser_seconds,
                "batch": watch.batch,
                "dense_milliseconds": 1000 * attention / calls / max(watch.batch, 1) / self.model.heads,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )

    def _probed(self, ready: Ready) -> Costs:
        """Costs as two plans of each family say that they are here."""
        facts, costs = self.work.facts, ready.costs
        if "probe" not in facts:
            model, batch = self.model, facts["batch"]
            dense = facts["dense_milliseconds"] * model.heads * model.layers * batch / 1000
            bench = Bench(self.target, self._few_steps, model.layers, model.heads, batch, dense, self.timer)
            lines = probe(bench, ready.candidates, costs, self.device)
            self.work.note({"probe": {family: [line.call, line.factor] for family, line in lines.items()}})
        lines = {family: Line(*parts) for family, parts in self.work.facts["probe"].items()}
        return corrected(costs, ready.candidates.kept, lines, facts["dense_milliseconds"] or None)

    def _few_steps(self) -> None:
        """Some steps of the timed run, or of the first calibration run, as the probe wants them."""
        with torch.no_grad():
            if not self.inputs:
                self.generate(0, STEPS)
            else:
                run = self.timed or self.inputs[0]
                again = (run * STEPS)[:STEPS] if self.total == 1 else run[:STEPS]
                run_denoiser(self.target, again, Watch(Calibration(total=STEPS), None, None))

    def _steps(self) -> int:
        if self.inputs:
            lengths = {len(run) for run in self.inputs}
            if len(lengths) > 1 or min(lengths) < 1:
                raise ValueError(f"inputs: wanted runs of equally many steps, at least 1, got {sorted(lengths)}")
            return lengths.pop()
        from visparse.measure.generate import default_arguments

        return self.settings.steps or int(default_arguments(self.target)["num_inference_steps"])

    def _targets(self, schedules: Mapping[str, Schedule], share: float) -> dict[str, float | None]:
        settings = self.settings
        if settings.speedup is None:
            return dict.fromkeys(schedules, settings.attention)
        wanted = {name: one.attention_for(settings.speedup, share) for name, one in schedules.items()}
        possible: dict[str, float | None] = {name: min(value, 1.0) for name, value in wanted.items() if value > 0}
        if not possible:
            best = max(one.ceiling(share) for one in schedules.values())
            raise ValueError(
                f"speedup: {settings.speedup} is beyond the ceiling: attention is {share:.0%} of a dense step, so the "
                f"denoising of a run gets at most {best:.2f} times faster with these dense steps, and "
                f"{1 / (1 - share):.2f} times with none, even if sparse attention cost nothing; ask for less, or for "
                "longer videos"
            )
        return possible

    def _calibration(self, ready: Ready) -> Calibration:
        """Both families are scored at the same steps."""
        schedules = ready.schedules
        return calibrate(schedules.get("foveal") or next(iter(schedules.values())), self.settings.judge)

    def _scorer(self, ready: Ready) -> Scorer:
        settings = self.settings
        return Scorer(
            ready.candidates,
            count=settings.rows,
            every=settings.every,
            seed=settings.seed,
            head_dim=self.model.head_dim,
        )

    def _run(self, watch: Watch, run: int, steps: int, inputs: Sequence[Any] | None = None) -> None:
        """One run, all dense; of a bare denoiser with other inputs than its own, where there are any."""
        watch.prompt = run
        if watch.scorer is not None:
            watch.scorer.forget()
        with captured(self.target, watch) as routers, torch.no_grad():
            for router in routers:
                router.restart()
            if self.inputs:
                run_denoiser(self.target, (inputs or self.inputs[run])[:steps], watch)
                return
            self.generate(run, steps)
