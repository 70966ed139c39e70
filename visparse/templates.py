"""Patterns as plans hold them: a pattern's JSON form, whose lengths may be shares of the grid.

`{"name": "neighborhood", "window": ["60%/2", "50%/8", "30%/8"]}` becomes a `Neighborhood` once the grid is known, so
one plan serves every grid. `"30%/8"` is 30 % of the axis, rounded to the nearest multiple of 8 (half up), at least 8,
but never more than the axis; `"30%"` means `"30%/1"`.

Lengths in tokens stay as they are, unless it is said for which grid they were made: then `Pattern.rescale` takes them
to the grid at hand. Shares are shares of the grid at hand in either case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from visparse.compensation.refresh import Overlap
from visparse.patterns import Pattern, PerHead, pattern_from_dict
from visparse.patterns.per_head import places
from visparse.shares import check_shares, has_shares, keep_shares, resolve_shares

_PART = re.compile(r"^(.*)\[(\d+)\]$", re.DOTALL)
_PROBES = ((100, 100, 100), (1, 1, 1))


@dataclass(frozen=True)
class PatternTemplate:
    """A pattern that may wait for its grid, or a list with one pattern per head (`PerHead`).

    Args:
        entry: the JSON form (`Pattern.to_dict`, `PerHead.to_dict`); a length on the three axes may be a share such as
            `"30%"`.
        made_for: grid (frames, height, width), in tokens, that the lengths were made for; None: they stay on all grids.
    """

    entry: Mapping[str, Any]
    made_for: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Check the entry by building the pattern for a grid."""
        object.__setattr__(self, "entry", _jsonable(self.entry))
        check_shares(self.entry)
        self._example()
        if self.made_for is not None:
            self.check(self.made_for)

    @classmethod
    def from_dict(cls, entry: object, where: str, made_for: tuple[int, int, int] | None = None) -> PatternTemplate:
        """Read an entry of a plan's table of patterns.

        Args:
            entry: the JSON form, a `Pattern`, a `PerHead` or a template.
            where: what holds it, for error texts.
            made_for: grid that its lengths were made for; None: they stay on all grids.

        Returns:
            The template.

        Raises:
            ValueError: the entry is no pattern, or does not fit the grid that it was made for; the text says why.
        """
        try:
            if isinstance(entry, PatternTemplate):
                return entry if entry.made_for == made_for else replace(entry, made_for=made_for)
            if isinstance(entry, (Pattern, PerHead)):
                return cls(entry.to_dict(), made_for)
            if isinstance(entry, Mapping):
                return cls(entry, made_for)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        raise ValueError(f"{where} must be a JSON object such as {{'name': 'neighborhood', ...}}, got {entry!r}")

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return dict(_jsonable(self.entry))

    def resolve(self, grid: tuple[int, int, int]) -> Pattern:
        """The pattern for a grid.

        Args:
            grid: (frames, height, width), in tokens.

        Raises:
            ValueError: the values do not go together on this grid, nothing sensible fits it, or this is a list with one
                pattern per head, which has no pattern of its own.
        """
        if self.per_head:
            raise ValueError("a list with one pattern per head has no single pattern; resolve each part of it")
        if self.made_for is None or self.made_for == grid:
            return pattern_from_dict(resolve_shares(self.entry, grid))
        pattern = pattern_from_dict(resolve_shares(self.entry, self.made_for)).rescale(self.made_for, grid)
        if not has_shares(self.entry):
            return pattern
        return pattern_from_dict(keep_shares(_jsonable(pattern), self.entry, grid))

    def check(self, grid: tuple[int, int, int]) -> None:
        """Refuse a grid that the pattern, or that of a head, does not fit.

        Args:
            grid: (frames, height, width), in tokens.

        Raises:
            ValueError: the text says how.
        """
        if self.per_head:
            for place in range(len(self.entry["patterns"])):
                self.part(place).check(grid)
            return
        token = torch.zeros(1, 3, dtype=torch.int64)
        self.resolve(grid).pairs(token, token, grid)

    @property
    def per_head(self) -> bool:
        """Whether this is a list with one pattern per head."""
        return self.entry.get("name") == PerHead.name

    def part(self, place: int) -> PatternTemplate:
        """One pattern of a list with one per head.

        Args:
            place: in the list.
        """
        return PatternTemplate(self.entry["patterns"][place], self.made_for)

    def places(self, heads: int) -> list[int]:
        """Where in a list with one pattern per head that of each head stands.

        Args:
            heads: number of heads.

        Raises:
            ValueError: there is not one pattern per head.
        """
        return places(len(self.entry["patterns"]), heads, self.entry.get("cycle", False))

    def _example(self) -> Pattern | PerHead:
        """The pattern for a large grid, or for the smallest one where shares do not go with the numbers beside them.

        A stride of 53 % may be too long for a window of 9 on a large grid only.
        """
        read = PerHead.from_dict if self.per_head else pattern_from_dict
        try:
            return read(resolve_shares(self.entry, _PROBES[0]))
        except ValueError as error:
            if not has_shares(self.entry):
                raise
            try:
                return read(resolve_shares(self.entry, _PROBES[1]))
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
        return PatternTemplate({**self.entry, **changes}, self.made_for)

    def __str__(self) -> str:
        """The pattern as a call."""
        return _call(self.entry)


class PatternTable(dict[str, PatternTemplate]):
    """A plan's table of patterns: `table["mix[2]"]` is the third pattern of `mix`, a list with one per head."""

    def __missing__(self, name: str) -> PatternTemplate:
        """Find a pattern of a list."""
        match = _PART.match(name)
        mix = self.get(match[1]) if match else None
        if match is None or mix is None or not mix.per_head or int(match[2]) >= len(mix.entry["patterns"]):
            raise KeyError(name)
        return mix.part(int(match[2]))


def _call(entry: Mapping[str, Any]) -> str:
    inside = [
        ", ".join(map(_call, value)) if key == "patterns" else f"{key}={value}"
        for key, value in entry.items()
        if key != "name"
    ]
    return f"{entry['name']}({', '.join(inside)})"


def _jsonable(value: Any) -> Any:
    """A copy as JSON values; patterns and what they hold take their JSON form."""
    if isinstance(value, (Pattern, Overlap)):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (tuple, list)) else value
