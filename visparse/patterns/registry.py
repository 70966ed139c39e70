"""Patterns by name."""

from collections.abc import Mapping
from typing import Any

from visparse.errors import nearest
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
from visparse.patterns.power_of_two import PowerOfTwo
from visparse.patterns.radial import Radial
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

PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls
    for cls in (
        Dense,
        Skip,
        Neighborhood,
        Radial,
        Union,
        Intersection,
        SlidingTile,
        Window,
        ShiftedWindow,
        Halo,
        Disc,
        Band,
        Diagonal,
        FirstFrame,
        MultiDiagonal,
        PowerOfTwo,
        SpatialHead,
        Strided,
        Stripe,
        TemporalHead,
    )
}

SELECTORS: dict[str, type[Selector]] = {cls.name: cls for cls in (TopK, TopP)}
_ALL: dict[str, type[Pattern]] = {**PATTERNS, **SELECTORS}


def pattern_from_dict(data: Mapping[str, Any]) -> Pattern:
    """Build a pattern from what `Pattern.to_dict` gave.

    Args:
        data: ``name`` and the fields of that pattern, as JSON values.

    Returns:
        The pattern.

    Raises:
        ValueError: no name, an unknown name or key (the error says which is nearest), a missing key, or a bad value.
        TypeError: a value of the wrong type.
    """
    name = data.get("name")
    if not isinstance(name, str):
        raise ValueError(f"name: wanted the name of a pattern, got {name!r}; known: {', '.join(_ALL)}")
    if name not in _ALL:
        raise ValueError(f"name: unknown pattern {name!r}; known: {', '.join(_ALL)}{nearest(name, _ALL)}")
    return _ALL[name].from_dict(data)
