"""Ready: what a search knows before anything is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visparse.head_search.candidates import Candidates
from visparse.head_search.costs import Costs
from visparse.head_search.schedule import Schedule
from visparse.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known before anything is scored.

    Attributes:
        layout: grid and extra tokens.
        share: of attention in a dense step; None while unknown.
        step_seconds: of a dense step.
        candidates: what heads may do.
        costs: of the candidates.
        schedules: family -> its steps.
        targets: family -> attention in a sparse step as a share of dense attention, where the goal is a time.
    """

    layout: Layout
    share: float | None
    step_seconds: float
    candidates: Candidates
    costs: Costs
    schedules: Mapping[str, Schedule]
    targets: Mapping[str, float | None]
