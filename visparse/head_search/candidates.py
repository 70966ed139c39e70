"""Candidates: what a head may do, in three families of plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visparse.compensation import Proxies, ReuseResidual
from visparse.layout import Layout
from visparse.patterns import (
    Band,
    Dense,
    FirstFrame,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    Selector,
    Skip,
    SlidingTile,
    SpatialHead,
    Stripe,
    TemporalHead,
    TopK,
    Union,
)

FAMILIES = ("plain", "foveal", "pooled")
_KEEPS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1.5)
PARTS = 8  # of a tile of keys, for pooled scores: nearly free, and nearer to exact scores than one mean of a tile
# Patterns by position that keep their shape when they are widened to tiles.
_WIDENED = ("dense", "skip", "near4", "near2", "frame", "frame4", "frame2", "tube4", "rows", "columns", "sink_tube4")


@dataclass(frozen=True)
class Candidate:
    """What a head may do.

    Attributes:
        name: short id, as the plan's table has it.
        family: ``"plain"``: exact masks, nothing stands in for what is not seen. ``"foveal"``: patterns widened to
            tiles, proxies for the other tiles, and the residual of a dense step. ``"pooled"``: nothing
            is reused, and tiles are chosen from pooled scores of their parts at each call; for models without steps.
        pattern: fixed by position, or a selector.
    """

    name: str
    family: str
    pattern: Pattern


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates for a layout.

    Attributes:
        kept: those that fit; each family has `Dense` and `Skip`.
        left_out: name -> why.
        proxies: of the families in whole tiles.
    """

    kept: tuple[Candidate, ...]
    left_out: Mapping[str, str]
    proxies: Proxies = field(default_factory=Proxies)

    def of(self, family: str) -> list[int]:
        """Places of the candidates of a family."""
        return [place for place, one in enumerate(self.kept) if one.family == family]


def make_candidates(
    layout: Layout,
    families: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    refresh: float | int | None = None,
    per_tile: int = 1,
    blocks: tuple[int, int] | None = None,
) -> Candidates:
    """The candidates that fit a grid.

    Args:
        layout: grid and extra tokens.
        families: some of `FAMILIES`.
        names: only those whose name begins with one of these; dense and skip are always there. None: all.
        patterns: more of them, by name; a name of the library is replaced.
        refresh: when choices by content are made again, see `visparse.compensation.refresh`.
        per_tile: proxies of each tile.
        blocks: tokens of a tile of queries and of keys, as `Proxies` has them.

    Returns:
        The candidates, and why others were left out.

    Raises:
        ValueError: an unknown family, or a name that no candidate has.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family: wanted some of {', '.join(FAMILIES)}, got {family!r}; use one of them")
    own = patterns or {}
    library = {**_library(layout), **own}
    for keep in _KEEPS:
        library.setdefault(f"top{keep}", TopK(share=1 / keep, score="mass_variance", refresh=refresh))
        library.setdefault(f"pooled{keep}", TopK(share=1 / keep, score="pooled", parts=PARTS))
    for wanted in names or ():
        if not any(name.startswith(wanted) for name in library):
            raise ValueError(f"candidates: no candidate begins with {wanted!r}; known: {', '.join(library)}")
    kept: list[Candidate] = []
    left_out: dict[str, str] = {}
    for family in families:
        for name, pattern in library.items():
            if names is not None and name not in ("dense", "skip") and not name.startswith(tuple(names)):
                continue
            if isinstance(pattern, Selector):
                if family == ("foveal" if pattern.reused else "pooled"):
                    kept.append(Candidate(name, family, pattern))
                continue
            if family != "plain" and name not in _WIDENED and name not in own:
                continue
            reason = _obstacle(pattern, layout)
            if reason is None:
                kept.append(Candidate(name, family, pattern))
            else:
                left_out[name] = reason
    # said, not left to the plan: what a plan keeps may have no selector, and its costs and errors are of these tiles
    proxies = Proxies(per_tile=per_tile, tiles="serpentine" if has_selector(kept) else "boxes", blocks=blocks)
    return Candidates(kept=tuple(kept), left_out=left_out, proxies=proxies)


def has_selector(candidates: Sequence[Candidate]) -> bool:
    """Whether some candidate chooses tiles by content; tiles are runs of a serpentine curve then, else boxes."""
    return any(isinstance(one.pattern, Selector) for one in candidates)


def compensations(
    family: str, refresh: float | int | None, proxies: Proxies | None = None
) -> tuple[Proxies | None, ReuseResidual | None]:
    """Proxies and residual of the plans of a family.

    Args:
        family: one of `FAMILIES`.
        refresh: when the residual is measured again.
        proxies: of the families in whole tiles; None: one a tile.
    """
    if family == "plain":
        return None, None
    return proxies or Proxies(), ReuseResidual(refresh=refresh) if family == "foveal" else None


def _library(layout: Layout) -> dict[str, Pattern]:
    """The patterns of the library at several sizes, by short id."""
    frames, height, width = layout.grid
    area = height * width
    found: dict[str, Pattern] = {"dense": Dense(), "skip": Skip()}

    def window(name: str, share: tuple[float, float, float]) -> None:
        size = tuple(max(1, min(n, round(n * part))) for n, part in zip(layout.grid, share, strict=True))
        stride = tuple(max(1, min(n, s)) for n, s in zip(size, (2, 8, 8), strict=True))
        found[name] = Neighborhood(window=size, stride=stride)  # type: ignore[arg-type]

    one = 1 / frames
    window("near8", (1 / 2, 1 / 8, 1 / 8))
    window("near4", (1 / 2, 1 / 4, 1 / 4))
    window("near2", (1 / 2, 1 / 2, 1 / 2))
    window("frame", (one, 1, 1))
    window("frame4", (one, 1 / 4, 1 / 4))
    window("frame2", (one, 1 / 2, 1 / 2))
    window("frames2", (1 / 2, 1, 1))
    window("tube8", (1, 1 / 8, 1 / 8))
    window("tube4", (1, 1 / 4, 1 / 4))
    window("tube2", (1, 1 / 2, 1 / 2))
    window("rows", (1, 1 / 4, 1))
    window("columns", (1, 1, 1 / 4))
    tile = (min(2, frames), min(8, height), min(8, width))
    for size in (3, 5):
        found[f"tiles{size}"] = SlidingTile(tile=tile, window=(min(size, -(-frames // tile[0])), size, size))
    for name, span in (("half", 0.5), ("1", 1.0), ("2", 2.0)):
        found[f"spatial_{name}"] = SpatialHead(width=span)
        found[f"temporal_{name}"] = TemporalHead(width=span)
    for part in (16, 8, 4):
        found[f"diagonals{part}"] = MultiDiagonal(width=max(1, frames * area // part))
        found[f"band{part}"] = Band(share=1 / part)
        found[f"stripes{part}"] = Stripe(every=part * 32, width=32)
    found["places16"] = Band(share=1 / 16, per_frame=True)
    found["radial"] = Radial()
    if frames > 1:
        found["sink_tube4"] = Union(patterns=(found["tube4"], FirstFrame()))
        found["sink_frame"] = Union(patterns=(found["frame"], FirstFrame()))
    return found


def _obstacle(pattern: Pattern, layout: Layout) -> str | None:
    """Why a pattern does not fit a grid; None where it does."""
    import torch

    token = torch.zeros(1, 3, dtype=torch.int64)
    try:
        pattern.pairs(token, token, layout.grid)
    except ValueError as error:
        return str(error)
    return None
