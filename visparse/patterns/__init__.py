"""Patterns: rules, fixed by position, that say which keys a query sees.

The names are imported when they are first used, so that a pattern's own file can be run:
`python -m visparse.patterns.radial` draws it.
"""

from typing import TYPE_CHECKING

from visparse.lazy import names_from

if TYPE_CHECKING:
    from visparse.patterns.base import Pattern
    from visparse.patterns.dense import Dense
    from visparse.patterns.neighborhood import Neighborhood
    from visparse.patterns.radial import Radial
    from visparse.patterns.registry import pattern_from_dict
    from visparse.patterns.skip import Skip

__all__ = ["Dense", "Neighborhood", "Pattern", "Radial", "Skip", "pattern_from_dict"]

__getattr__ = names_from(
    __name__,
    {
        "Dense": "visparse.patterns.dense",
        "Neighborhood": "visparse.patterns.neighborhood",
        "Pattern": "visparse.patterns.base",
        "Radial": "visparse.patterns.radial",
        "Skip": "visparse.patterns.skip",
        "pattern_from_dict": "visparse.patterns.registry",
    },
)
