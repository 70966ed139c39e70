"""Selectors of a plan's rules: which layers, heads or steps a rule is about.

A selector is `"all"`, one index, a list of indices, or a half-open range `"a:b"` whose ends may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Selector = str | int | tuple[int, ...]

_RANGE = re.compile(r"^\s*(\d*)\s*:\s*(\d*)\s*$")


def parse_selector(value: object, what: str) -> Selector:
    """Check a selector as it comes from JSON or Python and return its normal form.

    Args:
        value: `"all"`, an int >= 0, a list of ints >= 0, or `"a:b"` (half-open; an end may be left out).
        what: name of the argument, used in error texts.

    Returns:
        The selector; lists become tuples.

    Raises:
        ValueError: for any other value.
    """
    if isinstance(value, str):
        match = _RANGE.match(value)
        if value == "all":
            return value
        if match and not (match[1] and match[2] and int(match[1]) >= int(match[2])):
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:
            return value
    elif isinstance(value, Sequence) and value and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    raise ValueError(
        f"{what} must be 'all', an index >= 0, a non-empty list of indices >= 0 or a range 'a:b' with a < b; "
        f"got {value!r}"
    )


def selects(selector: Selector, index: int) -> bool:
    """Say whether `index` is one of those that a selector (from `parse_selector`) names."""
    if isinstance(selector, int):
        return index == selector
    if isinstance(selector, tuple):
        return index in selector
    if selector == "all":
        return True
    start, stop = _ends(selector)
    return index >= start and (stop is None or index < stop)


def edges(selector: Selector) -> set[int]:
    """Indices at which a selector's answer may change: the first index of each stretch, and the one after it."""
    if isinstance(selector, int):
        return {selector, selector + 1}
    if isinstance(selector, tuple):
        return {edge for index in selector for edge in (index, index + 1)}
    if selector == "all":
        return set()
    start, stop = _ends(selector)
    return {start} if stop is None else {start, stop}


def largest(selector: Selector) -> int:
    """The largest index that a selector names outright; -1 where it names none."""
    if isinstance(selector, int):
        return selector
    if isinstance(selector, tuple):
        return max(selector)
    if selector == "all":
        return -1
    start, stop = _ends(selector)
    return start if stop is None else stop - 1


def _ends(text: str) -> tuple[int, int | None]:
    match = _RANGE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a range 'a:b'; make selectors with parse_selector")
    return int(match[1] or 0), int(match[2]) if match[2] else None
