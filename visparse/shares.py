"""Lengths that are shares of an axis, in the JSON form of patterns: `"30%/8"` is 30 % in multiples of 8."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%(?:/([1-9]\d*))?$")


def check_shares(entry: Mapping[str, Any]) -> None:
    """Refuse what looks like a share and is none.

    Args:
        entry: JSON form of a pattern; entries in it are checked too.

    Raises:
        ValueError: names the field.
    """
    for key, value in _fields(entry):
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str) or "%" not in item:
                continue
            match = _SHARE.match(item)
            if match is None or not 0 < float(match[1]) <= 100:
                raise ValueError(f"{key}: a share of an axis looks like '30%' or '30%/8', up to 100%; got {item!r}")
            if not isinstance(value, list) or len(value) != 3:
                raise ValueError(f"{key}: shares come as a list of three (frames, height, width), got {value!r}")


def has_shares(entry: Mapping[str, Any]) -> bool:
    """Whether a length in an entry, or in the entries in it, is a share."""
    return any(_is_share(value) for _, value in _fields(entry))


def resolve_shares(entry: Any, grid: tuple[int, int, int]) -> Any:
    """Return a copy of an entry whose shares are lengths on a grid.

    Args:
        entry: JSON form of a pattern, or a part of it.
        grid: (frames, height, width), in tokens.
    """
    if isinstance(entry, dict):
        return {key: resolve_shares(item, grid) for key, item in entry.items()}
    if not isinstance(entry, list):
        return entry
    if _is_share(entry):
        return [_length(item, axis) for item, axis in zip(entry, grid, strict=True)]
    return [resolve_shares(item, grid) for item in entry]


def keep_shares(rescaled: Mapping[str, Any], entry: Mapping[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    """Return the JSON form of a rescaled pattern, with the shares of its entry taken of the grid at hand.

    Args:
        rescaled: JSON form of the pattern after `Pattern.rescale`.
        entry: the JSON form with shares that it was made from.
        grid: (frames, height, width), in tokens, that it was rescaled to.
    """
    changed = dict(rescaled)
    if rescaled["name"] != entry["name"]:  # it became another pattern, which has no such lengths
        return changed
    for key, value in entry.items():
        if _is_share(value):
            lengths = zip(value, rescaled[key], grid, strict=True)
            changed[key] = [_length(item, axis) if isinstance(item, str) else new for item, new, axis in lengths]
        elif key == "patterns":
            parts = zip(rescaled[key], value, strict=True)
            changed[key] = [keep_shares(new, part, grid) for new, part in parts]
    return changed


def _fields(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of an entry and of the entries in it."""
    for key, value in entry.items():
        for item in value if isinstance(value, list) else []:
            if isinstance(item, dict):
                yield from _fields(item)
        yield key, value


def _is_share(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, str) and "%" in item for item in value)


def _length(item: Any, axis: int) -> Any:
    match = _SHARE.match(item) if isinstance(item, str) else None
    if match is None:
        return item
    unit = int(match[2] or 1)
    return min(axis, unit * max(1, math.floor(float(match[1]) / 100 * axis / unit + 0.5)))
