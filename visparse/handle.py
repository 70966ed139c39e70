"""Handle: what `sparsify` returns."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from visparse.devices import execution_device
from visparse.layout import Layout
from visparse.plan import SparsePlan
from visparse.reporting import Report, make_report

if TYPE_CHECKING:
    from visparse.explain import Explanation
    from visparse.session import Session


class Handle:
    """The undo of one `sparsify`; also a context manager, whose end restores.

    Attributes:
        plan: the plan that runs, overrides included.
    """

    def __init__(self, plan: SparsePlan, sessions: Mapping[str, Session]) -> None:
        """Hold the sessions of all denoisers, by component name."""
        self.plan = plan
        self._sessions = dict(sessions)

    def restore(self) -> bool:
        """Put every original object back and remove every hook.

        Returns:
            False where nothing of this handle was installed any more (restored before, or replaced by a later
            `sparsify`); nothing is touched then.
        """
        return any([session.uninstall() for session in self._sessions.values()])

    def report(self, grid: tuple[int, int, int] | None = None) -> Report:
        """What ran in the last run; see `visparse.report`."""
        return make_report(self.plan, self._sessions, grid)

    def explain(self, steps: int, grid: tuple[int, int, int] | None = None) -> Explanation:
        """What the plan will do at each step of a run, and how long self-attention should take; `print` it.

        Args:
            steps: of the run.
            grid: (frames, height, width) in tokens; None: that of the last run.

        Returns:
            For the first denoiser of the pipeline; others share the plan.

        Raises:
            ValueError: no grid is known, or the plan cannot serve such a run; the text says why.
        """
        from visparse.explain import explain  # here, so that `import visparse` stays light

        session = next(iter(self._sessions.values()))
        layout = session.router.layout if grid is None else Layout(grid=grid)
        if layout is None:
            raise ValueError(f"grid: no run yet, so wanted a grid, got None; explain({steps}, grid=(21, 45, 80))")
        device = execution_device(session.module).type
        sigmas = session.router.clock.sigmas
        if sigmas is not None and len(sigmas) != steps:
            sigmas = None
        return explain(self.plan, session.router.model, layout, steps, device=device, sigmas=sigmas)

    def __enter__(self) -> Handle:
        """Return the handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore."""
        self.restore()

    def __repr__(self) -> str:
        """Plan, and where it is installed."""
        where = [name for name, session in self._sessions.items() if session.installed]
        return f"Handle(plan={self.plan.name!r}, installed on {', '.join(where) or 'nothing'})"
