"""PerHead: a list of patterns, one for each head of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from visparse.errors import check_keys
from visparse.layout import Grid
from visparse.patterns.base import Pattern
from visparse.patterns.combined import checked_patterns, read_patterns


@dataclass(frozen=True, kw_only=True)
class PerHead:
    """One pattern per head. It is no pattern itself, but an entry of a plan, and a list for `compile_lists`.

    ``compile_lists(mix.heads(12), layout, ...)`` compiles it; in a plan's table of patterns it stands like any pattern.

    Args:
        patterns: pattern of each head, from head 0; at least one.
        cycle: whether the patterns begin anew where there are more heads. If not, there is exactly one per head.

    Raises:
        TypeError: a part is no pattern, or ``cycle`` no bool.
        ValueError: there are no patterns.
    """

    name: ClassVar[str] = "per_head"

    patterns: tuple[Pattern, ...]
    cycle: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "patterns", checked_patterns(self.patterns))
        if type(self.cycle) is not bool:
            raise TypeError(f"cycle: wanted a bool, got {type(self.cycle).__name__} {self.cycle!r}")

    def heads(self, count: int) -> tuple[Pattern, ...]:
        """Return the pattern of every head.

        Args:
            count: number of heads.

        Returns:
            One pattern per head.

        Raises:
            ValueError: there is not one pattern per head.
        """
        return tuple(self.patterns[place] for place in places(len(self.patterns), count, self.cycle))

    def rescale(self, source: Grid, target: Grid) -> "PerHead":
        """Rescale every pattern. On another grid: each follows its own rule; see `Pattern.rescale`."""
        return replace(self, patterns=tuple(part.rescale(source, target) for part in self.patterns))

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as JSON values; `from_dict` reads them back."""
        return {"name": self.name, "patterns": [part.to_dict() for part in self.patterns], "cycle": self.cycle}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PerHead":
        """Build it from what `to_dict` gave.

        Args:
            data: fields, and ``name`` if it is there.

        Raises:
            ValueError: an unknown or missing key, another name, or a bad value.
            TypeError: a value of the wrong type.
        """
        values = dict(data)
        name = values.pop("name", cls.name)
        if name != cls.name:
            raise ValueError(f"name: wanted {cls.name!r}, got {name!r}; read it with pattern_from_dict")
        check_keys(values, ["patterns", "cycle"], f"{cls.name!r}")
        if "patterns" not in values:
            raise ValueError(f"{cls.name!r} lacks the key 'patterns'; give it a list with one pattern per head")
        return cls(**{**values, **read_patterns(values)})


def places(patterns: int, heads: int, cycle: bool) -> list[int]:
    """Say which pattern serves each head.

    Args:
        patterns: number of patterns.
        heads: number of heads.
        cycle: whether the patterns begin anew where there are more heads.

    Returns:
        Place of the pattern of each head.

    Raises:
        ValueError: there is not one pattern per head.
    """
    if patterns > heads or (patterns < heads and not cycle):
        raise ValueError(
            f"patterns: wanted one pattern per head, got {patterns} patterns for {heads} heads; "
            + ("leave some out" if patterns > heads else "give as many as heads, or cycle=True to repeat them")
        )
    return [head % patterns for head in range(heads)]
