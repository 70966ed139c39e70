"""One axis of key boxes that begin where the window of their query tile begins.

On an axis a pattern is a table, query by key. The keys that a tile of queries sees lie in a span, the union of the
windows of its queries. The span is cut into key sides from its own beginning, so that no key side is cut by a window
border only because tiles and windows are not aligned.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """What the query tiles of one axis see of it; U tiles on an axis of L tokens."""

    some: Tensor  # bool [U, L], whether any query of the tile keeps the key
    every: Tensor  # bool [U, L], whether all of them do
    low: Tensor  # int64 [U], first key that is kept; 0 where there is none
    high: Tensor  # int64 [U], end of the kept keys, not included; 0 where there is none


class Cut(NamedTuple):
    """Key sides of every query tile of one axis; U tiles, at most J key sides for each."""

    starts: Tensor  # int64 [U, J], first key of each side
    owned: Tensor  # int64 [U, J], first key that the side owns; the keys before it lie in the side before, too
    seen: Tensor  # bool [U, J], whether any pair is kept; False where the tile has fewer sides
    full: Tensor  # bool [U, J], whether all pairs are


def spans_of(table: Tensor, q_side: int) -> Spans:
    """Find what the query tiles of one axis see.

    Args:
        table: bool [L, L], query by key.
        q_side: queries per tile; the last tile may be cut by the end of the axis.
    """
    length = len(table)
    missing = -length % q_side
    some = torch.cat([table, table.new_zeros(missing, length)]).view(-1, q_side, length).any(1)
    every = torch.cat([table, table.new_ones(missing, length)]).view(-1, q_side, length).all(1)
    kept = some.any(1)
    low = some.to(torch.uint8).argmax(1)
    high = length - some.flip(1).to(torch.uint8).argmax(1)
    return Spans(some, every, low, high.where(kept, 0))


def cut_spans(spans: Spans, k_side: int) -> Cut:
    """Cut the spans of one axis into key sides.

    A side that would hang over the end of the axis makes the whole row of sides begin earlier; where that is not
    possible, the last side alone begins earlier and does not own the keys of the side before.

    Args:
        spans: what the query tiles see.
        k_side: keys per side, at most the length of the axis.
    """
    length = spans.some.shape[1]
    count = (spans.high - spans.low + k_side - 1) // k_side
    begin = torch.minimum(spans.low, length - count * k_side).clamp(min=0)
    number = torch.arange(int(count.max()))
    owned = (begin[:, None] + number * k_side).clamp(max=length)
    starts = owned.clamp(max=length - k_side)
    ends = starts + k_side
    seen = (_count(spans.some, ends) > _count(spans.some, owned)) & (number < count[:, None])
    full = (_count(spans.every, ends) - _count(spans.every, owned) == k_side) & seen
    return Cut(starts, owned, seen, full)


def masks_of(table: Tensor, cut: Cut, q_side: int, k_side: int) -> Tensor:
    """Return the mask of every query tile and key side of one axis.

    Args:
        table: bool [L, L], query by key.
        cut: the key sides.
        q_side: queries per tile.
        k_side: keys per side.

    Returns:
        bool [U, J, q_side, k_side]; True everywhere where the side is full, and False at queries behind the end of
        the axis where it is not.
    """
    length = len(table)
    padded = torch.cat([table, table.new_zeros(-length % q_side, length)]).view(-1, q_side, length)
    keys = cut.starts[..., None] + torch.arange(k_side)
    tile = torch.arange(len(padded))[:, None, None, None]
    kept = padded[tile, torch.arange(q_side)[:, None], keys[:, :, None]]
    return (kept & (keys >= cut.owned[..., None])[:, :, None]) | cut.full[..., None, None]


def _count(kept: Tensor, ends: Tensor) -> Tensor:
    """Count the kept keys before the ends, int64 [U, J]."""
    total = torch.nn.functional.pad(kept.cumsum(1), (1, 0))
    return total.gather(1, ends)
