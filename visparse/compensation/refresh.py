"""Refresh: at which steps of a run something that is reused is measured again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visparse.errors import check_keys

_KEYS = {"overlap_below": "below", "every": "every", "most": "most"}


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Measure again at the step after the one at which a choice of tiles was found to be out of date.

    At sparse steps each layer looks at a few tiles of queries and chooses for them anew, by exact scores; the overlap
    is the share of the new choice that the old one has, a mean over layers, heads, tiles and branches. A plan has one
    such rule: its selectors are followed, and its statistics and residual may have the same rule, to go with them.

    Args:
        below: measure again where the overlap falls below this, in (0, 1].
        every: look at each such step since the last measurement; 1: at every sparse step. A look costs 3.5 % of dense
            attention at 75,600 tokens with 40 heads of 128 (H200), so long runs may want to look less often.
        most: measure again so many times in a run; None: as often as the overlap falls.

    Raises:
        ValueError: a value that is not allowed.
    """

    below: float = 0.9
    every: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.below, (int, float)) or isinstance(self.below, bool) or not 0 < self.below <= 1:
            raise ValueError(f"below: wanted a share in (0, 1], got {self.below!r}; 0.9 is usual")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every: wanted an int >= 1, in steps, got {self.every!r}; 1 looks at every sparse step")
        if self.most is not None and (type(self.most) is not int or self.most < 1):
            raise ValueError(f"most: wanted an int >= 1 or None (no limit), got {self.most!r}; leave it out for none")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Overlap:
        """Read the JSON form, such as ``{"overlap_below": 0.9, "every": 1}``.

        Raises:
            ValueError: an unknown key (names the nearest), no `overlap_below`, or a value that does not fit.
        """
        check_keys(entry, _KEYS, "refresh")
        if "overlap_below" not in entry:
            raise ValueError(
                f"refresh: lacks the key 'overlap_below', got {dict(entry)!r}; give it a share such as 0.9"
            )
        try:
            return cls(**{_KEYS[key]: value for key, value in entry.items()})
        except ValueError as error:
            raise ValueError(f"refresh: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` gives back an equal one."""
        return {key: getattr(self, name) for key, name in _KEYS.items()}


Refresh = int | float | tuple[int | float, ...] | Overlap | None


def parse_refresh(refresh: object) -> Refresh:
    """Check when something is to be measured again.

    Args:
        refresh: None: never, the first measurement serves to the end. An int n: every n-th step after the first
            measurement. A float in (0, 1): that share of the run, counted from its begin, once. A tuple: these steps
            (ints), or these shares of the run (floats). An `Overlap`, or its JSON form: where a choice of tiles is
            found to be out of date.

    Returns:
        The same; lists become tuples, and JSON objects an `Overlap`.

    Raises:
        ValueError: 0, a negative or another value.
    """
    if isinstance(refresh, list):
        refresh = tuple(refresh)
    if isinstance(refresh, Mapping):
        return Overlap.from_dict(refresh)
    if refresh is None or isinstance(refresh, Overlap) or (type(refresh) is int and refresh > 0) or _share(refresh):
        return refresh  # type: ignore[return-value]
    if isinstance(refresh, tuple) and refresh and all((type(x) is int and x > 0) or _share(x) for x in refresh):
        return refresh
    raise ValueError(
        f"refresh: wanted None (never), an int > 0 (every so many steps), a share in (0, 1) of the run, a tuple of "
        f"steps or shares, or Overlap(below=0.9), got {refresh!r}; leave it out to measure once"
    )


def refresh_steps(refresh: Refresh, first: int, total: int | None) -> tuple[int, ...] | None:
    """Say at which steps something is measured again.

    Args:
        refresh: from `parse_refresh`.
        first: step of the first measurement.
        total: steps of the run; None while unknown.

    Returns:
        Steps behind `first`, ascending; None for "every n-th step" in a run of unknown length. Empty for an
        `Overlap`: the run decides.

    Raises:
        ValueError: a share is asked for and the number of steps is not known.
    """
    if refresh is None or isinstance(refresh, Overlap):
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


def _share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1
