"""Patterns: rules, fixed by position, that say which keys a query sees.

The names are imported when they are first used, so that a pattern's own file can be run:
`python -m visparse.patterns.radial` draws it.
"""

from typing import TYPE_CHECKING

from visparse.lazy import names_from

if TYPE_CHECKING:
    from visparse.patterns.base import Pattern
    from visparse.patterns.dense import Dense
    from visparse.patterns.disc import Disc
    from visparse.patterns.halo import Halo
    from visparse.patterns.neighborhood import Neighborhood
    from visparse.patterns.radial import Radial
    from visparse.patterns.registry import pattern_from_dict
    from visparse.patterns.shifted_window import ShiftedWindow
    from visparse.patterns.skip import Skip
    from visparse.patterns.sliding_tile import SlidingTile
    from visparse.patterns.window import Window

__all__ = [
    "Dense",
    "Disc",
    "Halo",
    "Neighborhood",
    "Pattern",
    "Radial",
    "ShiftedWindow",
    "Skip",
    "SlidingTile",
    "Window",
    "pattern_from_dict",
]

__getattr__ = names_from(
    __name__,
    {
        "Dense": "visparse.patterns.dense",
        "Disc": "visparse.patterns.disc",
        "Halo": "visparse.patterns.halo",
        "Neighborhood": "visparse.patterns.neighborhood",
        "Pattern": "visparse.patterns.base",
        "Radial": "visparse.patterns.radial",
        "ShiftedWindow": "visparse.patterns.shifted_window",
        "Skip": "visparse.patterns.skip",
        "SlidingTile": "visparse.patterns.sliding_tile",
        "Window": "visparse.patterns.window",
        "pattern_from_dict": "visparse.patterns.registry",
    },
)
