"""Patterns: rules, fixed by position, that say which keys a query sees."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visparse.patterns.base import Pattern
    from visparse.patterns.dense import Dense
    from visparse.patterns.neighborhood import Neighborhood
    from visparse.patterns.radial import Radial
    from visparse.patterns.registry import pattern_from_dict
    from visparse.patterns.skip import Skip

__all__ = ["Dense", "Neighborhood", "Pattern", "Radial", "Skip", "pattern_from_dict"]

_HOMES = {
    "Dense": "dense",
    "Neighborhood": "neighborhood",
    "Pattern": "base",
    "Radial": "radial",
    "Skip": "skip",
    "pattern_from_dict": "registry",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that `python -m visparse.patterns.radial` does not load that file twice.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
