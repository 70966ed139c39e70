"""Patterns as plans hold them: a pattern's JSON form, whose lengths may be shares of the grid.

`{"name": "neighborhood", "window": ["60%/2", "50%/8", "30%/8"]}` becomes a `Neighborhood` once the grid is known, so
one plan serves every grid. `"30%/8"` is 30 % of the axis, rounded to the nearest multiple of 8 (half up), at least 8,
but never more than the axis; `"30%"` means `"30%/1"`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visparse.patterns import Pattern, pattern_from_dict

_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%(?:/([1-9]\d*))?$")
_PROBES = ((100, 100, 100), (1, 1, 1))


@dataclass(frozen=True)
class PatternTemplate:
    """A pattern that may wait for its grid.

    Args:
        entry: the pattern's JSON form (`Pattern.to_dict`); a length on the three axes may be a share such as `"30%"`.
    """

    entry: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check the entry by building the pattern for a grid."""
        object.__setattr__(self, "entry", {key: _jsonable(value) for key, value in self.entry.items()})
        for key, value in self.entry.items():
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, str) or "%" not in item:
                    continue
                match = _SHARE.match(item)
                if match is None or not 0 < float(match[1]) <= 100:
                    raise ValueError(f"{key}: a share of an axis looks like '30%' or '30%/8', up to 100%; got {item!r}")
                if not isinstance(value, list) or len(value) != 3:
                    raise ValueError(f"{key}: shares come as a list of three (frames, height, width), got {value!r}")
        self._example()

    @classmethod
    def from_dict(cls, entry: object, where: str) -> PatternTemplate:
        """Read an entry of a plan's table of patterns.

        Args:
            entry: the JSON form, or a `Pattern`.
            where: what holds it, for error texts.

        Returns:
            The template; the entry itself where it is one.

        Raises:
            ValueError: the entry is no pattern; the text says why.
        """
        if isinstance(entry, PatternTemplate):
            return entry
        if isinstance(entry, Pattern):
            return cls(entry.to_dict())
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must be a JSON object such as {{'name': 'neighborhood', ...}}, got {entry!r}")
        try:
            return cls(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return {key: list(value) if isinstance(value, list) else value for key, value in self.entry.items()}

    def resolve(self, grid: tuple[int, int, int]) -> Pattern:
        """The pattern for a grid (frames, height, width), in tokens."""
        return pattern_from_dict({key: _resolved(value, grid) for key, value in self.entry.items()})

    def _example(self) -> Pattern:
        """The pattern for a large grid, or for the smallest one where shares do not go with the numbers beside them.

        A stride of 53 % may be too long for a window of 9 on a large grid only.
        """
        try:
            return self.resolve(_PROBES[0])
        except ValueError as error:
            if not any(
                isinstance(item, str) for value in self.entry.values() if isinstance(value, list) for item in value
            ):
                raise
            try:
                return self.resolve(_PROBES[1])
            except ValueError:
                raise error from None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the pattern has."""
        return tuple(key for key in self._example().to_dict() if key != "name")

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense pattern."""
        return self.entry["name"] == "dense"

    def with_changes(self, **changes: Any) -> PatternTemplate:
        """A copy with other parameters."""
        return PatternTemplate({**self.entry, **changes})

    def __str__(self) -> str:
        """The pattern as a call."""
        inside = ", ".join(f"{key}={value}" for key, value in self.entry.items() if key != "name")
        return f"{self.entry['name']}({inside})"


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resolved(value: Any, grid: tuple[int, int, int]) -> Any:
    if isinstance(value, list) and len(value) == 3:
        return [_length(item, axis) for item, axis in zip(value, grid, strict=True)]
    return value


def _length(item: Any, axis: int) -> Any:
    match = _SHARE.match(item) if isinstance(item, str) else None
    if match is None:
        return item
    unit = int(match[2] or 1)
    return min(axis, unit * max(1, math.floor(float(match[1]) / 100 * axis / unit + 0.5)))
