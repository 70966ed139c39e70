"""Estimate: what a pattern would visit on a grid, and how long attention would take on a device that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from visparse.boxes_order import choose_boxes
from visparse.compile import compile_lists, parse_order
from visparse.estimate_rates import Rate, all_rates, rates_of
from visparse.layout import Layout
from visparse.order import Order, Tile, best_of, try_orders
from visparse.patterns.base import Pattern
from visparse.patterns.skip import Skip
from visparse.templates import PatternTemplate
from visparse_kernels import BlockLists, preferred_blocks

_SHOWN = 4  # tried orders in the text; all are in `to_dict`


@dataclass(frozen=True, kw_only=True)
class GroupEstimate:
    """What the heads with one pattern visit.

    Attributes:
        pattern: the pattern, as text.
        heads: number of heads that have it.
        order: token order in words; boxes are named by their shapes.
        density: kept pairs / all pairs of tokens; exact.
        block_density: visited blocks / all blocks.
        fullest: share of the key blocks that is visited by the query block of the grid that visits the most: what is
            paid far from every border.
        query_blocks, full, masked: blocks of one head: all query blocks, visited ones without and with a mask.
        tried: order -> block density between tokens of the grid, as far as `Pattern.cover` tells (never too low), for
            every order of this block size that could be taken without boxes, best first.
    """

    pattern: str
    heads: int
    order: str
    density: float
    block_density: float
    fullest: float
    query_blocks: int
    full: int
    masked: int
    tried: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What attention of one layer would visit and take; `str()` is a table for people, `to_dict()` is JSON.

    Attributes:
        layout: grid and extra tokens.
        device: what was asked for.
        head_dim: size of a head.
        batch: number of sequences.
        block_q, block_k: block sizes in slots.
        boxes: whether every block is a box or a run.
        groups: one entry per distinct pattern.
        rate: what a block costs there; None where it was not measured.
        not_measured: why there is no time; None where there is one.
    """

    layout: Layout
    device: str
    head_dim: int
    batch: int
    block_q: int
    block_k: int
    boxes: bool
    groups: tuple[GroupEstimate, ...]
    rate: Rate | None
    not_measured: str | None

    @property
    def heads(self) -> int:
        """All heads."""
        return sum(group.heads for group in self.groups)

    @property
    def density(self) -> float:
        """Kept pairs / all pairs of tokens, mean over heads."""
        return sum(group.density * group.heads for group in self.groups) / self.heads

    @property
    def block_density(self) -> float:
        """Visited blocks / all blocks, mean over heads: what is paid for."""
        return sum(group.block_density * group.heads for group in self.groups) / self.heads

    @property
    def bound(self) -> float | None:
        """Upper bound of the speed-up of attention, 1 / block density; None where nothing is visited."""
        return 1 / self.block_density if self.block_density else None

    @property
    def milliseconds(self) -> float | None:
        """Predicted time of one call of `attend`; None where it was not measured."""
        if self.rate is None:
            return None
        columns = [(group.query_blocks, group.full, group.masked) for group in self.groups]
        sums = [
            self.batch * sum(column[i] * group.heads for column, group in zip(columns, self.groups, strict=True))
            for i in range(3)
        ]
        return self.rate.milliseconds(*sums)

    @property
    def dense_milliseconds(self) -> float | None:
        """Predicted time of PyTorch's fastest dense attention; None where it was not measured."""
        return None if self.rate is None else self.rate.dense_milliseconds(self.layout.tokens, self.heads, self.batch)

    @property
    def speedup(self) -> float | None:
        """Predicted dense time / predicted time; None where it was not measured, or nothing is visited."""
        return self.dense_milliseconds / self.milliseconds if self.dense_milliseconds and self.milliseconds else None

    @property
    def source(self) -> str | None:
        """Where the predicted times come from and how far they can be trusted; None where there are none."""
        rate = self.rate
        if rate is None:
            return None
        low, high = rate.tokens
        span = f"{low} tokens" if low == high else f"{low} to {high} tokens"
        notes = [
            f"fitted to {rate.rows} rows measured on {rate.device} in {rate.dtype} with {span} ({rate.source}), "
            f"at most {rate.worst:.0%} off on them"
        ]
        if not low <= self.layout.tokens <= high:
            notes.append(f"{self.layout.tokens} tokens are outside of what was measured")
        if rate.masked_ns is None and any(group.masked for group in self.groups):
            notes.append("masked blocks were not measured and are taken to cost what full ones do")
        return "; ".join(notes)

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        derived = ("heads", "density", "block_density", "bound", "milliseconds", "dense_milliseconds", "speedup")
        return {
            "grid": list(self.layout.grid),
            "before": self.layout.before,
            "after": self.layout.after,
            "tokens": self.layout.tokens,
            **{name: getattr(self, name) for name in ("device", "head_dim", "batch", "block_q", "block_k", "boxes")},
            **{name: getattr(self, name) for name in derived},
            "impl": self.rate and self.rate.impl,
            "dense": self.rate and self.rate.dense,
            "source": self.source,
            "not_measured": self.not_measured,
            "groups": [asdict(group) for group in self.groups],
        }

    def __str__(self) -> str:
        """The estimate as a table."""
        extra = f" + {self.layout.extra}" if self.layout.extra else ""
        lines = [
            f"{'x'.join(map(str, self.layout.grid))}{extra} = {self.layout.tokens} tokens, {self.heads} heads of "
            f"{self.head_dim}, batch {self.batch}, blocks {self.block_q}x{self.block_k}",
            f"  {'heads':>5}  {'density':>8}  {'blocks':>8}  {'fullest':>8}  {'full':>8}  {'masked':>8}  "
            "order and pattern",
        ]
        for group in self.groups:
            lines.append(
                f"  {group.heads:>5}  {group.density:>8.2%}  {group.block_density:>8.2%}  "
                f"{group.fullest:>8.2%}  {group.full:>8}  {group.masked:>8}  {group.order}: {group.pattern}"
            )
            if group.tried:
                best = ", ".join(f"{order} {share:.2%}" for order, share in list(group.tried.items())[:_SHOWN])
                lines.append(
                    f"  {'':>5}  orders{' without boxes' if self.boxes else ''}, {len(group.tried)} tried: {best}"
                )
        bound = "nothing is visited" if self.bound is None else f"at most {self.bound:.2f} times faster (1 / blocks)"
        lines.append(f"  {bound}")
        if self.rate is None:
            lines.append(f"  time: not measured: {self.not_measured}")
            return "\n".join(lines)
        times = (
            f"{self.milliseconds:.3g} ms with {self.rate.impl!r}, {self.rate.dense} {self.dense_milliseconds:.3g} ms"
        )
        lines.append(f"  predicted: {times}" + ("" if self.speedup is None else f": {self.speedup:.2f} times faster"))
        lines.append(f"  source: {self.source}")
        return "\n".join(lines)


def estimate(
    patterns: Pattern | PatternTemplate | Sequence[Pattern | PatternTemplate],
    layout: Layout,
    *,
    device: str = "cpu",
    head_dim: int = 128,
    heads: int = 24,
    batch: int = 1,
    block_q: int | None = None,
    block_k: int | None = None,
    order: str | Tile | Order = "auto",
) -> Estimate:
    """Say what patterns would visit on a grid, and how long attention would take on a device that was measured.

    Nothing is measured here and no device is needed: blocks are counted exactly, from the lists that would be used,
    and the time follows from measured costs of blocks that ship with visparse.

    Args:
        patterns: one pattern for all heads, or one per head, such as those of a plan.
        layout: grid and extra tokens.
        device: ``"cpu"``, a measured GPU such as ``"h200"``, or a device of this machine such as ``"cuda"``.
        head_dim: size of a head.
        heads: number of heads; with one pattern per head their number counts instead.
        batch: number of sequences.
        block_q: query slots per block; None: those that run fastest on the device.
        block_k: key slots per block; None: those that run fastest on the device.
        order: as in `visparse.compile.compile_lists`.

    Returns:
        The estimate. Where device, head size or block sizes were not measured it has no time and says so.

    Raises:
        TypeError: something in ``patterns`` is no pattern.
        ValueError: no patterns, a number below 1, bad block sizes or order, or a pattern that does not fit the grid.

    Source: the simulator that arXiv 2504.16922, section 4, describes: speed-up bounds from visited tiles.
    """
    for name, value in (("head_dim", head_dim), ("heads", heads), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}; 128, 24 and 1 are usual")
    many = [patterns] * heads if isinstance(patterns, (Pattern, PatternTemplate)) else list(patterns)
    per_head = [one.resolve(layout.grid) if isinstance(one, PatternTemplate) else one for one in many]
    kind = _kind(device)
    rate = _choose_rate(kind, head_dim, block_q, block_k, order)
    if rate is not None:
        sizes = rate.block_q, rate.block_k
    else:
        preferred = preferred_blocks("cpu" if kind == "cpu" else "cuda", head_dim)
        sizes = block_q or preferred[0], block_k or preferred[1]
    boxes = rate is not None and rate.boxes
    if not per_head:
        raise ValueError("patterns: wanted at least one pattern, got none; give one such as Dense()")
    for pattern in per_head:
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"patterns: wanted visparse patterns, got {type(pattern).__name__} {pattern!r}; "
                "build one such as Neighborhood(window=3), or read JSON with pattern_from_dict"
            )
    counts: dict[Pattern, int] = {}
    for pattern in per_head:
        counts[pattern] = counts.get(pattern, 0) + 1
    return Estimate(
        layout=layout,
        device=device,
        head_dim=head_dim,
        batch=batch,
        block_q=sizes[0],
        block_k=sizes[1],
        boxes=boxes,
        groups=tuple(_group(pattern, count, layout, sizes, order, boxes) for pattern, count in counts.items()),
        rate=rate,
        not_measured=None if rate is not None else _why_not(kind, head_dim, sizes),
    )


def _group(
    pattern: Pattern, heads: int, layout: Layout, sizes: tuple[int, int], order: str | Tile | Order, boxes: bool
) -> GroupEstimate:
    if isinstance(pattern, Skip):
        return GroupEstimate(
            pattern=str(pattern),
            heads=heads,
            order="skipped",
            density=0.0,
            block_density=0.0,
            fullest=0.0,
            query_blocks=0,
            full=0,
            masked=0,
            tried={},
        )
    block_q, block_k = sizes
    tried = try_orders(pattern, layout, block_q=block_q, block_k=block_k)
    taken = parse_order(order, boxes) or (
        choose_boxes(pattern, layout, block_q=block_q, block_k=block_k, device=torch.device("cpu"))
        if boxes
        else best_of(tried)
    )
    lists = compile_lists([pattern], layout, block_q=block_q, block_k=block_k, order=taken, boxes=boxes)
    blocks = -(-layout.visual // block_q) * -(-layout.visual // block_k)
    return GroupEstimate(
        pattern=str(pattern),
        heads=heads,
        order=_in_words(taken, boxes),
        density=lists.density,
        block_density=lists.block_density,
        fullest=_fullest(lists, layout),
        query_blocks=lists.n_q,
        full=len(lists.full_indices),
        masked=len(lists.partial_indices),
        tried={str(order): count / blocks for order, count in sorted(tried.items(), key=lambda item: item[1])},
    )


def _fullest(lists: BlockLists, layout: Layout) -> float:
    visited = lists.full_offsets.diff() + lists.partial_offsets.diff()
    parts = (layout.extra,) if lists.boxes is None else (layout.before, layout.after)
    of_grid = lists.n_q - sum(-(-part // lists.block_q) for part in parts)
    blocks = lists.n_k if lists.boxes is None else -(-layout.tokens // lists.block_k)
    return int(visited[:of_grid].max()) / blocks


def _in_words(order: Order, boxes: bool) -> str:
    if not boxes:
        return str(order)
    q, k = ("runs" if box is None else "boxes " + "x".join(map(str, box)) for box in (order.q, order.k))
    return q if q == k else f"queries {q}, keys {k}"


def _kind(device: str) -> str:
    """Short name of a device, as rates have it."""
    if device.split(":")[0] == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(torch.device(device))
        return next((rate.kind for rate in all_rates() if rate.device == name), name)
    return device.lower()


def _choose_rate(
    kind: str, head_dim: int, block_q: int | None, block_k: int | None, order: str | Tile | Order
) -> Rate | None:
    """The rate of the fastest implementation that serves these blocks; boxes need the choice of their order."""
    for rate in rates_of(kind, head_dim):
        fits = block_q in (None, rate.block_q) and block_k in (None, rate.block_k)
        if fits and (not rate.boxes or order in ("auto", "row-major")):
            return rate
    return None


def _why_not(kind: str, head_dim: int, sizes: tuple[int, int]) -> str:
    """Say what of a case was not measured, and what was."""
    measured = sorted({(rate.kind, rate.head_dim) for rate in all_rates()})
    known = ", ".join(f"{name} with head_dim {size}" for name, size in measured)
    what = f"blocks of {sizes[0]}x{sizes[1]}" if (kind, head_dim) in measured else f"{kind} with head_dim {head_dim}"
    return f"{what} (measured: {known})"
