"""Patterns: rules, fixed by position, that say which keys a query sees."""

from visparse.patterns.base import Pattern
from visparse.patterns.dense import Dense
from visparse.patterns.neighborhood import Neighborhood
from visparse.patterns.radial import Radial
from visparse.patterns.registry import pattern_from_dict
from visparse.patterns.skip import Skip

__all__ = ["Dense", "Neighborhood", "Pattern", "Radial", "Skip", "pattern_from_dict"]
