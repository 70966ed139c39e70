"""What `Union` and `Intersection` share: a pattern made of patterns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from visparse.distinct import distinct_rows
from visparse.layout import Grid
from visparse.patterns.base import Pattern
from visparse.patterns.combined_masks import number_masks

C = TypeVar("C", bound="Combined")


@dataclass(frozen=True, kw_only=True)
class Combined(Pattern):
    """Base of the patterns that are made of patterns.

    Args:
        patterns: the parts, at least one; they may be combined themselves.

    Raises:
        TypeError: a part is no pattern.
        ValueError: there are no parts.
    """

    join: ClassVar[Callable[[Any, Any], Any]]  # of two tables: `operator.and_` or `operator.or_`

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        """Check the parts."""
        object.__setattr__(self, "patterns", checked_patterns(self.patterns))

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Join what the parts keep; see `Pattern.pairs`."""
        kept: Tensor = reduce(type(self).join, (part.pairs(q, k, grid) for part in self.patterns))
        return kept

    def cover(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Join the bounds of the parts; see `Pattern.cover`."""
        some, every = zip(*(part.cover(q, k, grid) for part in self.patterns), strict=True)
        return reduce(type(self).join, some), reduce(type(self).join, every)

    def tables(self, grid: Grid) -> list[tuple[Tensor, ...]] | None:
        """Tables of all parts, axis by axis; None where a part has none. See `Pattern.axes`."""
        tables = [part.axes(grid) for part in self.patterns]
        known = [own for own in tables if own is not None]
        return list(zip(*known, strict=True)) if len(known) == len(tables) else None

    def rescale(self: C, source: Grid, target: Grid) -> C:
        """Rescale every part. On another grid: each part follows its own rule; see `Pattern.rescale`."""
        return replace(self, patterns=tuple(part.rescale(source, target) for part in self.patterns))

    def alike(self, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid) -> Tensor | None:
        """Number pairs of blocks by the masks of all parts; see `Pattern.alike`."""
        numbers = []
        for part in self.patterns:
            number = part.alike(q, k, rows, cols, grid)
            if number is None:
                factors = part.factors(grid)
                if factors is None:
                    return None
                number = number_masks(factors, q, k, rows, cols)
            numbers.append(number)
        return distinct_rows(torch.stack(numbers, dim=1))[1]

    def to_dict(self) -> dict[str, Any]:
        """Return name and parts as JSON values; see `Pattern.to_dict`."""
        return {"name": self.name, "patterns": [part.to_dict() for part in self.patterns]}

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
        """Build the pattern and its parts from what `to_dict` gave; see `Pattern.from_dict`."""
        return super().from_dict({**data, **read_patterns(data)})


def checked_patterns(patterns: object) -> tuple[Pattern, ...]:
    """Return the parts as a tuple.

    Args:
        patterns: a list or a tuple of patterns.

    Raises:
        TypeError: it is something else, or a part is no pattern.
        ValueError: there are no parts.
    """
    example = "give for example patterns=(Neighborhood(window=3), Radial())"
    if not isinstance(patterns, (list, tuple)):
        raise TypeError(f"patterns: wanted a tuple of patterns, got {type(patterns).__name__} {patterns!r}; {example}")
    for place, part in enumerate(patterns):
        if not isinstance(part, Pattern):
            raise TypeError(
                f"patterns: wanted patterns, got {type(part).__name__} {part!r} at place {place}; {example}"
            )
    if not patterns:
        raise ValueError(f"patterns: wanted at least one pattern, got none; {example}")
    return tuple(patterns)


def read_patterns(data: Mapping[str, Any]) -> dict[str, Any]:
    """Build the parts of a JSON form.

    Args:
        data: fields; those of a part are a JSON object under ``patterns``, or a `Pattern`.

    Returns:
        The field ``patterns`` where it is a list, else nothing.

    Raises:
        ValueError: a part cannot be read; the text says which.
        TypeError: a value of the wrong type in a part.
    """
    from visparse.patterns.registry import pattern_from_dict  # here, because the registry knows this file

    parts = data.get("patterns")
    if not isinstance(parts, (list, tuple)):
        return {}
    built: list[Any] = []
    for place, part in enumerate(parts):
        try:
            built.append(pattern_from_dict(part) if isinstance(part, Mapping) else part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"patterns, place {place}: {error}") from error
    return {"patterns": built}
