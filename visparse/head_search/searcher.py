"""Searcher: one search, from the first look at the model to the plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from visparse.adapter import find_denoisers, unwrapped
from visparse.head_search.build import build_plan
from visparse.head_search.candidates import Candidates, make_candidates
from visparse.head_search.capture import (
    Calibration,
    OutOfTimeError,
    Watch,
    captured,
    run_denoiser,
    run_pipeline,
)
from visparse.head_search.choose import Chosen, Table, predicted
from visparse.head_search.costs import Costs, make_costs
from visparse.head_search.outlook import Outlook
from visparse.head_search.refine import output_errors, variants_of
from visparse.head_search.schedule import Schedule, calibrate, make_schedule
from visparse.head_search.score import Scorer
from visparse.head_search.settings import SearchSettings
from visparse.head_search.shard import gather_scores, processes
from visparse.head_search.work import WorkFile
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.run import Progress

_USELESS = 0.9  # relative error of attention that is no better than no attention


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known before anything is scored."""

    layout: Layout
    share: float | None
    step_seconds: float
    candidates: Candidates
    costs: Costs
    schedules: Mapping[str, Schedule]
    targets: Mapping[str, float | None]  # family -> attention in a sparse step, where the goal is a time


class Searcher:
    """One search on one pipeline or denoiser."""

    def __init__(
        self,
        target: Any,
        settings: SearchSettings,
        *,
        inputs: Sequence[Sequence[Any]] = (),
        progress: Progress | None = None,
    ) -> None:
        """Look at the model, and open the work file.

        Args:
            target: a diffusers pipeline or a denoiser.
            settings: what to do.
            inputs: of a bare denoiser: for each run the keyword arguments of each step.
            progress: told about every step.

        Raises:
            ValueError: inputs and target do not go together, or the work file is of another search.
        """
        self.target, self.settings, self.progress = target, settings, progress or Progress()
        denoisers = find_denoisers(target)
        module, adapter = next(iter(denoisers.values()))
        self.model = adapter.fingerprint(unwrapped(module))
        self.device = next(module.parameters()).device
        self.inputs = [list(run) for run in inputs]
        if isinstance(target, nn.Module) != bool(self.inputs):
            raise ValueError(
                "inputs: wanted them for a bare denoiser, and only for one: a list of runs, each a list with the "
                "keyword arguments of every step; a pipeline gets prompts"
            )
        self.total = self._steps()
        self.rank, self.world = processes()
        path = settings.work
        if path is not None and self.world > 1:
            path = path.with_name(f"{path.name}.{self.rank}")
        self.work = WorkFile(path, {**self._identity(module), "rank": [self.rank, self.world]})

    @property
    def runs(self) -> int:
        """Calibration runs of all processes."""
        return len(self.inputs) or max(len(self.settings.prompts), 1)

    def prepare(self) -> Ready:
        """Find the grid and attention's share of a step, list candidates with their costs, refuse what cannot be.

        Raises:
            ValueError: the goal is beyond the ceiling, or the device was not measured.
        """
        facts, settings = self.work.facts, self.settings
        if not facts:
            watch = Watch(Calibration(total=min(2, self.total)), None, None)
            self._run(watch, 0, steps=min(2, self.total))
            if watch.layout is None:
                raise ValueError("target: its denoiser was not called; nothing can be searched")
            share = watch.attention_seconds / watch.denoiser_seconds if watch.denoiser_seconds else 0.0
            layout = watch.layout
            self.work.note(
                {
                    "layout": [list(layout.grid), layout.before, layout.after],
                    "share": min(share, 0.9999),
                    "step_seconds": watch.denoiser_seconds,
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
            )
            facts = self.work.facts
        grid, before, after = facts["layout"]
        layout = Layout((grid[0], grid[1], grid[2]), before, after)
        own = self.device.type if self.device.index is None else f"{self.device.type}:{self.device.index}"
        share = facts["share"] if settings.share is None else settings.share
        if settings.speedup is not None and settings.share is None and settings.rates not in (None, own):
            raise ValueError(
                f"speedup: attention's share of a step was measured on {own}, the rates are of {settings.rates!r}; "
                "give its share there by share=..., or a goal such as attention=0.25"
            )
        schedules = {
            family: make_schedule(family, self.total, settings.dense_steps, settings.refresh)
            for family in settings.families
        }
        targets = self._targets(schedules, share)
        candidates = make_candidates(
            layout,
            [family for family in settings.families if family in targets],
            names=settings.candidates,
            patterns=settings.patterns,
            refresh=settings.refresh,
        )
        return Ready(
            layout=layout,
            share=share,
            step_seconds=facts["step_seconds"],
            candidates=candidates,
            costs=make_costs(candidates.kept, layout, self.model.head_dim, settings.rates or own),
            schedules=schedules,
            targets=targets,
        )

    def outlook(self) -> Outlook:
        """What a search would do and take: one step of scoring is tried, nothing is kept."""
        ready = self.prepare()
        watch = Watch(
            Calibration(total=2, measure=frozenset({0}), judge=frozenset({1})),
            self._scorer(ready),
            WorkFile(None, {}),
        )
        self._run(watch, 0, steps=min(2, self.total))
        calibration = self._calibration(ready)
        busy = len(calibration.judge) + len(calibration.measure)
        runs = -(-self.runs // self.world)
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
            seconds=runs * (self.total * ready.step_seconds + busy * watch.scoring_seconds / 2),
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
        table = Table(scores, ready.candidates, ready.costs)
        calls = {(key[0], key[1]) for key in scores}
        if not self.settings.refine:
            return self._plan(self.choose(table, ready), ready, reasons, calls)
        return self._refined(table, ready, reasons, calls)

    def score(self, ready: Ready) -> dict[int, str]:
        """Run the calibration prompts of this process.

        Returns:
            Layers that could not be scored, and why.
        """
        mine = [run for run in range(self.runs) if run % self.world == self.rank and run not in self.work.done]
        self.progress.expect(len(mine) * self.total)
        watch = Watch(self._calibration(ready), self._scorer(ready), self.work)
        watch.tick = self.progress.tick
        if self.settings.minutes is not None:
            watch.deadline = time.perf_counter() + 60 * self.settings.minutes
        try:
            for run in mine:
                self.progress.start(f"run {run + 1} of {self.runs}")
                self._run(watch, run, steps=self.total)
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

    def _refined(
        self, table: Table, ready: Ready, reasons: Mapping[int, str], calls: set[tuple[int, int]]
    ) -> SparsePlan:
        """The best of several allocations, by the model's output; what was judged before is not run again."""
        settings, plans, refused = self.settings, {}, []
        if self.inputs:
            raise ValueError("refine: wanted a pipeline, whose output can be judged, got a bare denoiser; leave it out")
        for variant in variants_of(list(ready.targets))[: settings.refine]:
            weights = variant.weights(len(table.layers))
            goals = {"attention": ready.targets[variant.family], "density": settings.density}
            try:
                chosen = table.by_budget(variant.family, self.model.layers, weights=weights, only=variant.only, **goals)
            except ValueError as error:
                refused.append(error)
                continue
            plans[variant.name] = self._plan(chosen, ready, reasons, calls)
        if not plans:
            raise refused[0]
        key = f"{settings.goal}={getattr(settings, settings.goal)}, rates of {ready.costs.device}"
        known: dict[str, float] = dict(self.work.facts.get("refined", {}).get(key, {}))
        missing = {name: plan for name, plan in plans.items() if name not in known}
        if missing:
            prompts = min(2, self.runs)
            self.progress.expect((len(missing) + 1) * prompts * self.total)
            self.progress.start("refine")
            known |= output_errors(self._generate, self.target, missing, prompts)
            self.work.note({"refined": {**self.work.facts.get("refined", {}), key: known}})
        best = min(plans, key=lambda name: known[name])
        judged = {name: round(known[name], 6) for name in plans}
        return replace(plans[best], measured={**plans[best].measured, "output_errors": judged, "taken": best})

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _steps(self) -> int:
        if self.inputs:
            lengths = {len(run) for run in self.inputs}
            if len(lengths) > 1 or min(lengths) < 2:
                raise ValueError(f"inputs: wanted runs of equally many steps, at least 2, got {sorted(lengths)}")
            return lengths.pop()
        from visparse.measure.generate import default_arguments

        return self.settings.steps or int(default_arguments(self.target)["num_inference_steps"])

    def _identity(self, module: nn.Module) -> dict[str, Any]:
        """What two parts of one search must agree in; the goal is not among it."""
        settings = self.settings
        names = ("family", "dense_steps", "refresh", "judge", "rows", "every", "seed", "rule", "candidates")
        weights = next(p for p in unwrapped(module).parameters() if p.ndim > 1 and p.is_floating_point())
        return {
            "model": vars(self.model).copy(),
            "weights": float(weights.detach().flatten()[:4096].double().abs().sum()),
            "prompts": list(settings.prompts),
            "call": {name: repr(value) for name, value in sorted(settings.call.items())},
            "inputs": [len(run) for run in self.inputs],
            "steps": self.total,
            "patterns": {name: one.to_dict() for name, one in sorted(settings.patterns.items())},
            **{name: getattr(settings, name) for name in names},
        }

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
        return calibrate(ready.schedules.get("foveal") or ready.schedules["plain"], self.settings.judge)

    def _scorer(self, ready: Ready) -> Scorer:
        settings = self.settings
        return Scorer(
            ready.candidates,
            count=settings.rows,
            every=settings.every,
            seed=settings.seed,
            head_dim=self.model.head_dim,
        )

    def _run(self, watch: Watch, run: int, steps: int) -> None:
        """One run, all dense."""
        watch.prompt = run
        if watch.scorer is not None:
            watch.scorer.forget()
        with captured(self.target, watch) as routers, torch.no_grad():
            for router in routers:
                router.restart()
            if self.inputs:
                run_denoiser(self.target, self.inputs[run][:steps], watch)
                return
            self._generate(run, steps)

    def _generate(self, run: int, steps: int | None = None) -> Any:
        """Run the pipeline on a calibration prompt."""
        prompts = self.settings.prompts
        arguments = {**self.settings.call, **({"prompt": prompts[run]} if prompts else {})}
        return run_pipeline(self.target, arguments, steps or self.total, self.settings.seed + run)

    def _plan(self, found: Chosen, ready: Ready, reasons: Mapping[int, str], calls: set[tuple[int, int]]) -> SparsePlan:
        from visparse.measure.environment import describe_device, find_versions

        settings, schedule = self.settings, ready.schedules[found.family]
        expected = self.runs * len(self._calibration(ready).judge)
        notes = [f"found by visparse search: {found.family} family, {settings.goal}"]
        missing = self.model.layers - len(found.layers)
        if missing:
            notes.append(f"partial: {missing} of {self.model.layers} layers were not scored and stay dense")
        elif len(calls) < expected:
            notes.append(f"partial: {len(calls)} of {expected} calibration steps were scored")
        notes += [reason if layer < 0 else f"layer {layer}: {reason}" for layer, reason in sorted(reasons.items())]
        if any(one is None for one in self._projections()):
            notes.append("some layers have no plain output projection: their errors are those of the heads")
        calibration = self._calibration(ready)
        measured = {
            "goal": {settings.goal: getattr(settings, settings.goal, settings.limit)},
            "predicted": predicted(found, schedule, ready.share),
            "attention_share": None if ready.share is None else round(ready.share, 6),
            "steps": self.total,
            "calibration": {
                "runs": self.runs,
                "judged": sorted(calibration.judge),
                "measured": sorted(calibration.measure),
                **{name: getattr(settings, name) for name in ("rows", "every", "seed")},
            },
            "layers": {str(layer): [round(error, 5), round(ms, 5)] for layer, (error, ms) in found.layers.items()},
            "rates": ready.costs.source,
            "device": describe_device(str(self.device)),
            "versions": find_versions(),
            "date": self.work.facts["date"],
        }
        return build_plan(
            settings.name,
            found.picks,
            family=found.family,
            model=self.model,
            grid=ready.layout.grid,
            dense_steps=settings.dense_steps,
            refresh=settings.refresh,
            notes="; ".join(notes),
            measured=measured,
        )

    def _projections(self) -> list[Any]:
        from visparse.head_search.capture import projection_of

        module, adapter = next(iter(find_denoisers(self.target).values()))
        return [projection_of(layer, self.model) for layer in adapter.layers(unwrapped(module)).values()]
