"""The front door: `sparsify`, `restore`, `report`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from visparse.adapter import find_denoisers, unwrapped
from visparse.handle import Handle
from visparse.one_call import for_one_call
from visparse.plan import SparsePlan
from visparse.presets import AUTO, PRESETS, load_plan
from visparse.reporting import Report, make_report
from visparse.settings import Settings
from visparse.steps import Clock, SchedulerSteps

if TYPE_CHECKING:
    from visparse.session import Session

_SETTINGS = [field.name for field in fields(Settings)]


def sparsify(
    target: Any, plan: str | Path | SparsePlan = "radial", *, strict: bool = False, **overrides: Any
) -> Handle:
    """Make the self-attention of a pipeline, denoiser or vision transformer sparse, in place.

    A second call replaces the first one cleanly. If anything is wrong, an error is raised and nothing has changed.

    Args:
        target: a diffusers pipeline (each of its denoisers that visparse knows is served), a denoiser, or a timm vision
            transformer. The latter has no denoising steps: presets run there with `dense_steps=0`, and a plan that
            needs a dense step is an error.
        plan: `"auto"`: the plan beside the model, else the safest preset (see `visparse.presets.auto_plan`). Name of a
            preset (`"dense"`, `"radial"`, `"neighborhood"`), path of a plan file or of a folder that holds
            `visparse_plan.json`, or a `SparsePlan`.
        strict: raise where a layer or call cannot be served. Else it runs dense, with a warning and a reported
            reason.
        overrides: `dense_steps`, `dense_layers` (see `SparsePlan`); `impl`, `block_q`, `block_k`, `order`, `timing`
            (see `visparse.settings.Settings`); or parameters of the plan's pattern, such as `window` or `decay`.

    Returns:
        Handle with `restore()`, `report()` and `plan`; usable in a `with` statement.

    Raises:
        TypeError: the target is neither a pipeline nor a module, or the plan is no plan.
        ValueError: unknown plan or override (names the nearest), a plan for another model, or one that needs steps
            for a model without any, no known denoiser, or no layer that can be served.
        FileNotFoundError: no plan at a path.
    """
    settings = Settings(strict=strict, **{name: overrides.pop(name) for name in _SETTINGS if name in overrides})
    chosen = load_plan(plan, target).with_changes(settings=_SETTINGS, **overrides)
    denoisers = find_denoisers(target)
    for _, adapter in denoisers.values():
        if adapter.timestep is None:
            preset = isinstance(plan, str) and plan in (*PRESETS, AUTO)
            chosen = for_one_call(chosen, adapter.model_class, free=preset and "dense_steps" not in overrides)
    from visparse.router import Router  # here, so that `import visparse` stays light
    from visparse.session import Session

    clock = Clock(chosen.stage, SchedulerSteps(None if isinstance(target, nn.Module) else target))
    sessions: dict[str, Session] = {}
    for name, (module, adapter) in denoisers.items():
        fingerprint = adapter.fingerprint(unwrapped(module))
        chosen.check_model(fingerprint)
        sessions[name] = Session(module, adapter, Router(chosen, fingerprint, settings, clock))
    restore(target)
    handle = Handle(chosen, sessions)
    try:
        for session in sessions.values():
            session.router.undo = handle.restore
            session.install()
    except BaseException:
        handle.restore()
        raise
    return handle


def restore(target: Any) -> bool:
    """Undo `sparsify`: the very same processors and classes are back, all hooks are gone.

    Args:
        target: the pipeline or denoiser.

    Returns:
        False where it was not sparsified; nothing is touched then.

    Raises:
        TypeError: the target is neither a pipeline nor a module.
        ValueError: there is no denoiser that visparse knows.
    """
    return any([session.uninstall() for session in _live_sessions(target).values()])


def report(target: Any, grid: tuple[int, int, int] | None = None) -> Report:
    """What visparse did in the last run of a pipeline or denoiser; `print` it, or take `to_dict()`.

    Args:
        target: a sparsified pipeline or denoiser.
        grid: (frames, height, width) in tokens: show the densities that the plan would have there. Without it, those of
            the last run.

    Returns:
        The report.

    Raises:
        ValueError: the target is not sparsified, or a pattern does not fit the grid.
    """
    live = _live_sessions(target)
    if not live:
        raise ValueError("nothing to report: this target is not sparsified; call visparse.sparsify(target, plan) first")
    return make_report(next(iter(live.values())).router.plan, live, grid)


def _live_sessions(target: Any) -> dict[str, Session]:
    """Sessions that are installed on the denoisers of a target, by component name."""
    denoisers = find_denoisers(target)
    from visparse.session import session_of  # here, so that `import visparse` stays light

    found = {name: session_of(module) for name, (module, _) in denoisers.items()}
    return {name: session for name, session in found.items() if session is not None}
