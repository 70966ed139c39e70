"""Patterns: rules, fixed by position, that say which keys a query sees.

The names are imported when they are first used, so that a pattern's own file can be run:
`python -m visparse.patterns.radial` draws it.
"""

from typing import TYPE_CHECKING

from visparse.lazy import names_from

if TYPE_CHECKING:
    from visparse.patterns.band import Band
    from visparse.patterns.base import Pattern
    from visparse.patterns.dense import Dense
    from visparse.patterns.diagonal import Diagonal
    from visparse.patterns.disc import Disc
    from visparse.patterns.first_frame import FirstFrame
    from visparse.patterns.halo import Halo
    from visparse.patterns.intersection import Intersection
    from visparse.patterns.multi_diagonal import MultiDiagonal
    from visparse.patterns.neighborhood import Neighborhood
    from visparse.patterns.per_head import PerHead
    from visparse.patterns.power_of_two import PowerOfTwo
    from visparse.patterns.radial import Radial
    from visparse.patterns.registry import pattern_from_dict
    from visparse.patterns.selector import Selector, TopK, TopP
    from visparse.patterns.shifted_window import ShiftedWindow
    from visparse.patterns.skip import Skip
    from visparse.patterns.sliding_tile import SlidingTile
    from visparse.patterns.spatial_head import SpatialHead
    from visparse.patterns.strided import Strided
    from visparse.patterns.stripe import Stripe
    from visparse.patterns.temporal_head import TemporalHead
    from visparse.patterns.union import Union
    from visparse.patterns.window import Window

__all__ = [
    "Band",
    "Dense",
    "Diagonal",
    "Disc",
    "FirstFrame",
    "Halo",
    "Intersection",
    "MultiDiagonal",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PowerOfTwo",
    "Radial",
    "Selector",
    "ShiftedWindow",
    "Skip",
    "SlidingTile",
    "SpatialHead",
    "Strided",
    "Stripe",
    "TemporalHead",
    "TopK",
    "TopP",
    "Union",
    "Window",
    "pattern_from_dict",
]

__getattr__ = names_from(
    __name__,
    {
        "Band": "visparse.patterns.band",
        "Dense": "visparse.patterns.dense",
        "Diagonal": "visparse.patterns.diagonal",
        "Disc": "visparse.patterns.disc",
        "FirstFrame": "visparse.patterns.first_frame",
        "Halo": "visparse.patterns.halo",
        "Intersection": "visparse.patterns.intersection",
        "MultiDiagonal": "visparse.patterns.multi_diagonal",
        "Neighborhood": "visparse.patterns.neighborhood",
        "Pattern": "visparse.patterns.base",
        "PerHead": "visparse.patterns.per_head",
        "PowerOfTwo": "visparse.patterns.power_of_two",
        "Radial": "visparse.patterns.radial",
        "Selector": "visparse.patterns.selector",
        "ShiftedWindow": "visparse.patterns.shifted_window",
        "Skip": "visparse.patterns.skip",
        "SlidingTile": "visparse.patterns.sliding_tile",
        "SpatialHead": "visparse.patterns.spatial_head",
        "Strided": "visparse.patterns.strided",
        "Stripe": "visparse.patterns.stripe",
        "TemporalHead": "visparse.patterns.temporal_head",
        "TopK": "visparse.patterns.selector",
        "TopP": "visparse.patterns.selector",
        "Union": "visparse.patterns.union",
        "Window": "visparse.patterns.window",
        "pattern_from_dict": "visparse.patterns.registry",
    },
)
