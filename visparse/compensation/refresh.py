"""Refresh: at which steps of a run something that is reused is measured again."""

from __future__ import annotations

import math

Refresh = int | float | tuple[int | float, ...] | None


def parse_refresh(refresh: object) -> Refresh:
    """Check when something is to be measured again.

    Args:
        refresh: None: never, the first measurement serves to the end. An int n: every n-th step after the first
            measurement. A float in (0, 1): that share of the run, counted from its begin, once. A tuple: these steps
            (ints), or these shares of the run (floats).

    Returns:
        The same; lists become tuples.

    Raises:
        ValueError: 0, a negative or another value.
    """
    if isinstance(refresh, list):
        refresh = tuple(refresh)
    if refresh is None or (type(refresh) is int and refresh > 0) or _share(refresh):
        return refresh  # type: ignore[return-value]
    if isinstance(refresh, tuple) and refresh and all((type(x) is int and x > 0) or _share(x) for x in refresh):
        return refresh
    raise ValueError(
        f"refresh: wanted None (never), an int > 0 (every so many steps), a share in (0, 1) of the run, or a tuple of "
        f"steps or shares, got {refresh!r}; leave it out to measure once"
    )


def refresh_steps(refresh: Refresh, first: int, total: int | None) -> tuple[int, ...] | None:
    """Say at which steps something is measured again.

    Args:
        refresh: from `parse_refresh`.
        first: step of the first measurement.
        total: steps of the run; None while unknown.

    Returns:
        Steps behind `first`, ascending; None for "every n-th step" in a run of unknown length, see `is_refresh`.

    Raises:
        ValueError: a share is asked for and the number of steps is not known.
    """
    if refresh is None:
        return ()
    if type(refresh) is int:
        return None if total is None else tuple(range(first + refresh, total, refresh))
    entries = refresh if isinstance(refresh, tuple) else (refresh,)
    if total is None and any(isinstance(entry, float) for entry in entries):
        raise ValueError(
            f"refresh={refresh} is a share of the run's steps, and their number is not known here "
            "(a bare model, or a pipeline that does not tell); give steps as ints"
        )
    steps = {math.floor(x * total + 0.5) if isinstance(x, float) and total is not None else int(x) for x in entries}
    return tuple(sorted(step for step in steps if step > first and (total is None or step < total)))


def is_refresh(refresh: Refresh, first: int, step: int, total: int | None) -> bool:
    """Say whether something is measured again at a step.

    Args:
        refresh: from `parse_refresh`.
        first: step of the first measurement.
        step: of the run.
        total: steps of the run; None while unknown.

    Raises:
        ValueError: a share is asked for and the number of steps is not known.
    """
    if type(refresh) is int:
        return step > first and (step - first) % refresh == 0
    return step in (refresh_steps(refresh, first, total) or ())


def _share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1
