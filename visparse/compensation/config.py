"""What stands in for the keys that a query does not see: proxy tokens, softmax statistics, a residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from visparse.compensation.refresh import Overlap, Refresh, parse_refresh
from visparse.errors import check_keys, nearest

KINDS = ("mean", "sample", "agent")
TILES = ("auto", "boxes", "serpentine")
STATISTICS_STORAGE = ("token", "block")
RESIDUAL_STORAGE = ("auto", "full", "fp8", "average", "average-fp8", "low-rank", "host")
C = TypeVar("C", bound="_Config")


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Base of the parts of a plan that are read from JSON objects."""

    @classmethod
    def from_dict(cls: type[C], entry: object, where: str) -> C:
        """Read a part of a plan.

        Args:
            entry: the JSON form, or the object itself.
            where: what holds it, for error texts.

        Raises:
            ValueError: an unknown key or a value that does not fit.
        """
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: wanted a JSON object or {cls.__name__}, got {entry!r}")
        check_keys(entry, [field.name for field in fields(cls)], where)
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON values; `from_dict` gives back an equal one."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Proxies(_Config):
    """Proxy tokens: one token for each tile that a query does not see, weighted by the tokens that it stands for.

    The key and the value of a proxy are means over a part of a tile, and log n is added to its logit, n being the
    number of its tokens. A tile is seen exactly or by proxy by a whole block of queries, never in part; patterns are
    widened to whole tiles. Where all keys of a tile are equal, its proxy is exact. Keys are pooled as attention gets
    them, after rotary embedding.

    Args:
        per_tile: proxies for each tile of keys; 1, 2, 4, 8, ...: the tile is halved along its longest axis again and
            again.
        kind: ``"mean"``; ``"sample"``, the token in the middle of each part; or ``"agent"``, a mean weighted by the
            softmax of the part's mean query with its keys, the first half of Agent Attention inside a tile.
        levels: 1, or 2: the tiles of a box of 2 x 2 x 2 tiles, none of which is seen, have one proxy together
            (enrichment with coarser tokens, as in log-linear sparse attention, but no token counts twice).
        tiles: how the grid is cut: into ``"boxes"``, whose sides are powers of two and which hang over the ends of the
            grid, or into runs of a ``"serpentine"`` curve, compact on every grid and without padding (eight in a row
            are a box of levels then). ``"auto"``: serpentine where a pattern of the plan chooses tiles by content.
        blocks: tokens of a tile of queries and of a tile of keys: a multiple of 16 that is a power of two or three
            times one, and a power of two from 32 on. None: what the Hopper kernel likes, 192 and 128 with heads of 64,
            else 128 and 128, on every device. Short sequences want smaller ones, such as 96 and 32: the CPU kernel
            takes them at the same speed, GPUs at less than half of it.

    Raises:
        ValueError: a value that is not one of those above.

    Source: PT-DiT, arXiv 2409.04005 (proxy tokens by mean or sample); LLSA, arXiv 2512.16615 (log of the weight,
    levels); Agent Attention, arXiv 2312.08874 (agents). That seen tiles are left out, and the merge by log-sum-exp,
    are visparse's own.
    """

    per_tile: int = 1
    kind: str = "mean"
    levels: int = 1
    tiles: str = "auto"
    blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if type(self.per_tile) is not int or self.per_tile not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"per_tile: wanted a power of two from 1 to 32, got {self.per_tile!r}; 1 is the cheapest")
        _check_name("kind", self.kind, KINDS)
        _check_name("tiles", self.tiles, TILES)
        if type(self.levels) is not int or self.levels not in (1, 2):
            raise ValueError(f"levels: wanted 1 or 2, got {self.levels!r}; 1 keeps every tile's own proxies")
        if self.blocks is not None:
            _check_blocks(self.blocks)
            if self.per_tile > self.blocks[1]:
                raise ValueError(f"per_tile: wanted at most the {self.blocks[1]} keys of a tile, got {self.per_tile}")


@dataclass(frozen=True, kw_only=True)
class ReuseStatistics(_Config):
    """Softmax statistics of dense steps: the share of the denominator that sparse attention sees, reused.

    On a dense step ``log_rho = lse_sparse - lse_dense`` is measured; later outputs are multiplied by exp(log_rho).

    Args:
        refresh: when it is measured again, see `visparse.compensation.refresh`.
        ramp: added to rho after each sparse step; 0.04 as published.
        storage: ``"token"``: fp16 for each token and head; ``"block"``: its mean over each block of queries.

    Raises:
        ValueError: a value that is not allowed.

    Source: Re-ttention, arXiv 2505.22918, section 4.
    """

    refresh: Refresh = None
    ramp: float = 0.04
    storage: str = "token"

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "refresh", parse_refresh(self.refresh))
        if not isinstance(self.ramp, (int, float)) or isinstance(self.ramp, bool) or not 0 <= self.ramp < 1:
            raise ValueError(f"ramp: wanted a number in [0, 1), got {self.ramp!r}; 0.04 is the published one")
        _check_name("storage", self.storage, STATISTICS_STORAGE)


@dataclass(frozen=True, kw_only=True)
class ReuseResidual(_Config):
    """The residual: dense minus sparse output of a dense step, added to later sparse outputs.

    It is kept for each head, before the output projection; the projection is linear, so this is what the published
    methods keep behind it.

    Args:
        refresh: when it is measured again, see `visparse.compensation.refresh`.
        storage: ``"full"``, ``"fp8"``, ``"average"`` (means over groups of tokens), ``"average-fp8"``, ``"low-rank"``,
            ``"host"`` (pinned memory, fetched ahead), or ``"auto"``: the most exact of full, fp8 and average-fp8 with
            which all layers and branches stay within ``memory``.
        memory: GiB, for ``"auto"``.
        group: (frames, height, width) in tokens of a group of the averages.
        rank: for ``"low-rank"``.

    Raises:
        ValueError: a value that is not allowed.

    Source: Re-ttention, arXiv 2505.22918; DiTFastAttn, arXiv 2406.08552 (window attention with residual).
    """

    refresh: Refresh = None
    storage: str = "auto"
    memory: float = 6.0
    group: tuple[int, int, int] = (1, 2, 2)
    rank: int = 16

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "refresh", parse_refresh(self.refresh))
        _check_name("storage", self.storage, RESIDUAL_STORAGE)
        if not isinstance(self.memory, (int, float)) or isinstance(self.memory, bool) or self.memory <= 0:
            raise ValueError(f"memory: wanted GiB above 0, got {self.memory!r}")
        if len(self.group) != 3 or not all(type(side) is int and side > 0 for side in self.group):
            raise ValueError(f"group: wanted three ints > 0 (frames, height, width), got {self.group!r}")
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank: wanted an int above 0, got {self.rank!r}; 8 to 32 are usual")


def _json(value: Any) -> Any:
    if isinstance(value, Overlap):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _check_blocks(blocks: object) -> None:
    fits = isinstance(blocks, tuple) and len(blocks) == 2 and all(type(size) is int and size > 0 for size in blocks)
    if isinstance(blocks, tuple) and fits:
        q, k = blocks
        fits = q % 16 == 0 and q // (q & -q) in (1, 3) and q <= 512 and 32 <= k <= 512 and k & (k - 1) == 0
    if not fits:
        raise ValueError(
            "blocks: wanted (queries, keys) of a tile, queries a multiple of 16 that is a power of two or three times "
            f"one, keys a power of two from 32, both up to 512, got {blocks!r}; (96, 32) suits short sequences on a CPU"
        )


def _check_name(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: wanted one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")
