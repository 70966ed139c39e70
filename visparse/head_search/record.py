"""Record: the plan of a search with all that it keeps about how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visparse.adapter import find_denoisers, unwrapped
from visparse.head_search.build import build_plan
from visparse.head_search.capture import projection_of
from visparse.head_search.choose import Chosen, predicted
from visparse.head_search.ready import Ready
from visparse.head_search.schedule import Schedule, calibrate
from visparse.plan import SparsePlan

if TYPE_CHECKING:
    from visparse.head_search.searcher import Searcher


class Recorder:
    """Makes plans of allocations, with notes and figures."""

    def __init__(
        self, searcher: Searcher, ready: Ready, reasons: Mapping[int, str], calls: set[tuple[int, int]]
    ) -> None:
        """Record for one search.

        Args:
            searcher: of the model.
            ready: what was known before scoring.
            reasons: layers that could not be scored, and why.
            calls: (run, step) that were scored.
        """
        self.searcher, self.ready, self.reasons, self.calls = searcher, ready, reasons, calls
        self.calibration = calibrate(ready.schedules.get("foveal") or next(iter(ready.schedules.values())), self._judge)

    @property
    def _judge(self) -> int:
        return self.searcher.settings.judge

    def plan(
        self,
        found: Chosen,
        *,
        schedule: Schedule | None = None,
        dense_steps: int | float | None = None,
        refresh: Any = ...,
        more: Mapping[str, Any] | None = None,
    ) -> SparsePlan:
        """The plan of an allocation.

        Args:
            found: the allocation.
            schedule, dense_steps, refresh: where they are not those of the settings.
            more: further entries of `measured`.
        """
        searcher, ready, settings = self.searcher, self.ready, self.searcher.settings
        schedule = schedule or ready.schedules[found.family]
        return build_plan(
            settings.name,
            found.picks,
            family=found.family,
            model=searcher.model,
            grid=ready.layout.grid,
            dense_steps=settings.dense_steps if dense_steps is None else dense_steps,
            refresh=settings.refresh if refresh is ... else refresh,
            notes="; ".join(self._notes(found, schedule)),
            measured={**self._measured(found, schedule), **(more or {})},
            starts=schedule.starts,
            proxies=ready.candidates.proxies,
        )

    def with_entries(self, plan: SparsePlan, entries: Mapping[str, Any]) -> SparsePlan:
        """A plan with more entries in `measured`."""
        return replace(plan, measured={**plan.measured, **entries})

    def _notes(self, found: Chosen, schedule: Schedule) -> list[str]:
        searcher = self.searcher
        notes = [f"found by visparse search: {found.family} family, {searcher.settings.goal}"]
        missing = searcher.model.layers - len(found.layers)
        expected = searcher.runs * len(self.calibration.judge)
        if missing:
            notes.append(f"partial: {missing} of {searcher.model.layers} layers were not scored and stay dense")
        elif len(self.calls) < expected:
            notes.append(f"partial: {len(self.calls)} of {expected} calibration steps were scored")
        if len(schedule.starts) > 1:
            notes.append(f"its ranges of steps are those of a run of {schedule.total} steps")
        notes += [reason if layer < 0 else f"layer {layer}: {reason}" for layer, reason in sorted(self.reasons.items())]
        module, adapter = next(iter(find_denoisers(searcher.target).values()))
        layers = adapter.layers(unwrapped(module)).values()
        if any(projection_of(layer, searcher.model) is None for layer in layers):
            notes.append("some layers have no plain output projection: their errors are those of the heads")
        return notes

    def _measured(self, found: Chosen, schedule: Schedule) -> dict[str, Any]:
        from visparse.measure.environment import describe_device, find_versions

        searcher, ready, settings = self.searcher, self.ready, self.searcher.settings
        return {
            "goal": {settings.goal: getattr(settings, settings.goal, settings.limit)},
            "predicted": predicted(found, schedule, ready.share),
            "attention_share": None if ready.share is None else round(ready.share, 6),
            "steps": searcher.total,
            "calibration": {
                "runs": searcher.runs,
                "judged": sorted(self.calibration.judge),
                "measured": sorted(self.calibration.measure),
                **{name: getattr(settings, name) for name in ("rows", "every", "seed")},
            },
            "layers": {str(layer): [round(error, 5), round(ms, 5)] for layer, (error, ms) in found.layers.items()},
            "rates": ready.costs.source,
            "device": describe_device(str(searcher.device)),
            "versions": find_versions(),
            "date": searcher.work.facts["date"],
        }
