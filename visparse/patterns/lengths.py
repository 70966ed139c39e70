"""Lengths on the axes of the grid: how patterns read, check and rescale them."""

from math import floor

from visparse.layout import Grid
from visparse.patterns.base import AXES

Lengths = int | tuple[int, int, int]


def check_lengths(name: str, value: object, *, least: int = 1, unit: str = "tokens") -> None:
    """Check a parameter that is one length, or three.

    Args:
        name: of the parameter, for the error texts.
        value: what came.
        least: smallest length that is allowed.
        unit: what is counted, for the error texts.

    Raises:
        TypeError: not an int, and not a tuple of three.
        ValueError: a length below ``least``.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) not in (1, 3) or any(type(part) is not int for part in parts):
        raise TypeError(f"{name}: wanted a whole number or three of them (frames, height, width), got {value!r}")
    if min(parts) < least:
        raise ValueError(f"{name}: wanted at least {least}, got {value}; count it in {unit}")


def three(value: Lengths) -> tuple[int, int, int]:
    """Return one length per axis; a single number stands for all axes."""
    return value if isinstance(value, tuple) else (value, value, value)


def on_grid(value: Lengths, grid: Grid, *, short: int = 1) -> tuple[int, int, int]:
    """Return one length per axis of a grid; a single number stands for all axes that are longer than 1.

    Args:
        value: one length, or one per axis.
        grid: (frames, height, width), in tokens.
        short: what a single number means on an axis of one token.
    """
    if isinstance(value, tuple):
        return value
    frames, height, width = (value if length > 1 else short for length in grid)
    return frames, height, width


def at_most(name: str, lengths: tuple[int, int, int], limits: tuple[int, int, int], grid: Grid, why: str) -> None:
    """Check that lengths do not exceed what a grid allows.

    Args:
        name: of the parameter, for the error text.
        lengths: one per axis.
        limits: the longest that is allowed, one per axis.
        grid: (frames, height, width), in tokens.
        why: what the limit is, for the error text.

    Raises:
        ValueError: one is too long; the text names the axis.
    """
    for axis, length, limit in zip(AXES, lengths, limits, strict=True):
        if length > limit:
            raise ValueError(
                f"{name}: wanted at most {limit} on the {axis} axis ({why}), got {length} on the grid {grid}; "
                f"make it {limit} or less, or take rescale"
            )


def in_proportion(lengths: tuple[int, int, int], source: Grid, target: Grid) -> tuple[int, int, int]:
    """Let lengths follow their axes: rounded half up, at least 1, at most the axis.

    A length that is the whole axis stays the whole axis.

    Args:
        lengths: one per axis of the source.
        source: grid that they were made for.
        target: grid that they shall serve.
    """
    frames, height, width = (
        min(new, max(1, floor(length * new / old + 0.5)))
        for length, old, new in zip(lengths, source, target, strict=True)
    )
    return frames, height, width
