"""Selectors: patterns whose blocks are chosen from what attention sees, not by position."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from visparse.compensation.refresh import Overlap, Refresh, parse_refresh
from visparse.errors import nearest
from visparse.layout import Grid
from visparse.patterns.base import Pattern

SCORES = ("pooled", "mass", "mass_variance")
PARTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Selector(Pattern):
    """Base of the selectors. What may be chosen is everything, so as a pattern a selector keeps all pairs.

    Args:
        score: by what tiles are chosen. ``"pooled"``: softmax of mean query and mean key, anew at every step.
            ``"mass"``: their share of the softmax, exact, from a dense step, and reused. ``"mass_variance"``: that
            times the variance of the logits inside the tile, which is what a proxy token gets wrong.
        refresh: when a choice by mass is made again, see `visparse.compensation.refresh`.
        sample: every so many queries are looked at, for the scores from a dense step.
        parts: for pooled scores, boxes of equal size that each tile of keys is cut into, each with a mean key of its
            own: 1 (as published), 2, 4, 8 or 16. A tile's score is the sum over its parts. On a trained ViT eight of
            them come nearer to dense than one (feature error 0.166, not 0.181; gallery/results/saliency_search.json).
    """

    score: str = "mass"
    refresh: Refresh = None
    sample: int = 4
    parts: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        if self.score not in SCORES:
            raise ValueError(
                f"score: wanted one of {', '.join(SCORES)}, got {self.score!r}{nearest(str(self.score), SCORES)}"
            )
        object.__setattr__(self, "refresh", parse_refresh(self.refresh))
        if self.refresh is not None and not self.reused:
            raise ValueError(
                f"refresh: pooled scores are computed anew at every step, got refresh={self.refresh!r}; leave it out"
            )
        if type(self.parts) is not int or self.parts not in PARTS:
            raise ValueError(f"parts: wanted 1, 2, 4, 8 or 16, got {self.parts!r}; 1 takes one mean of each tile")
        if self.parts > 1 and self.reused:
            raise ValueError(
                f"parts: wanted 1 for score={self.score!r}, which is exact, got {self.parts}; leave it out, or use "
                "score='pooled'"
            )
        if type(self.sample) is not int or self.sample not in (1, 2, 4, 8):
            raise ValueError(f"sample: wanted 1, 2, 4 or 8, got {self.sample!r}; 1 looks at every query")

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as JSON values; see `Pattern.to_dict`."""
        values = super().to_dict()
        return values | {"refresh": self.refresh.to_dict()} if isinstance(self.refresh, Overlap) else values

    @property
    def reused(self) -> bool:
        """Whether the choice is made at a dense step and reused."""
        return self.score != "pooled"

    @property
    @abstractmethod
    def shares(self) -> tuple[float, float]:
        """Share of the tiles that a block of queries keeps: least and most; the mean where a budget is spread."""

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Keep all pairs: each may be chosen; see `Pattern.pairs`."""
        shape = torch.broadcast_shapes(q[..., 0].shape, k[..., 0].shape)
        return torch.ones(shape, dtype=torch.bool, device=q.device)


@dataclass(frozen=True, kw_only=True)
class TopK(Selector):
    """The tiles with the highest scores, the same number for every block of queries.

    Extra tokens (text) are always seen and do not count. On another grid: nothing changes, it is a share.

    Args:
        share: of the tiles that is kept, in (0, 1]; at least one is.
        spread: False: each block of queries of each head keeps as many. True: the mean over heads and blocks is
            `share`, and those keep more whose scores are higher, between a quarter of `share` and four times as many.

    Source: VMoBA, VSA, NABLA and others (pooled scores); SparseD, arXiv 2509.24014 (exact scores, reused).
    """

    name: ClassVar[str] = "top_k"

    share: float = 0.125
    spread: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not isinstance(self.share, (int, float)) or isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise ValueError(f"share: wanted a share of the tiles in (0, 1], got {self.share!r}; 0.125 is an eighth")
        if type(self.spread) is not bool:
            raise ValueError(f"spread: wanted True or False, got {self.spread!r}")

    @property
    def shares(self) -> tuple[float, float]:
        """The share, twice; see `Selector.shares`."""
        return self.share, self.share


@dataclass(frozen=True, kw_only=True)
class TopP(Selector):
    """The fewest tiles whose scores sum to a share of the total, between a least and a most number.

    Extra tokens (text) are always seen and do not count. On another grid: nothing changes, all are shares.

    Args:
        mass: share of the sum of scores in (0, 1).
        least: least share of the tiles, in (0, 1].
        most: largest share of the tiles.

    Source: NABLA, arXiv 2507.13546; Twilight, arXiv 2502.02770.
    """

    name: ClassVar[str] = "top_p"

    mass: float = 0.9
    least: float = 0.02
    most: float = 0.25

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not isinstance(self.mass, float) or not 0 < self.mass < 1:
            raise ValueError(f"mass: wanted a share in (0, 1), got {self.mass!r}; 0.9 is usual")
        if not 0 < self.least <= self.most <= 1:
            raise ValueError(
                f"least, most: wanted 0 < least <= most <= 1, shares of the tiles, got {self.least!r} and {self.most!r}"
            )

    @property
    def shares(self) -> tuple[float, float]:
        """The bounds; see `Selector.shares`."""
        return self.least, self.most
