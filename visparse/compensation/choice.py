"""Choice: the tiles that the heads of a layer see exactly, by position and by content, as block lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.laid_out import Laid
from visparse.compensation.pooled import pooled_tiles, scores_of_laid
from visparse.compensation.proxy_table import ProxyTable
from visparse.compensation.tiles import Tiles, kept_tiles
from visparse.patterns import Pattern, Selector, Skip, TopK, TopP
from visparse_kernels import BlockLists, block_scores, choose_per_head, choose_top_k, choose_top_p, lists_from_map

_SPREAD = 4  # a block of queries keeps at most so many times the mean, and at least the mean over this


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a layer sees exactly.

    Attributes:
        lists: of all heads; where rows of the batch differ, of the heads of the first row, then of the second, and on.
        rows: rows of the batch that have lists of their own; 1 where all have the same.
        head_group: int32 [H], the group of each head in ``hidden``; -1 where it is skipped.
        hidden: int32 [1 or B, G, n_q, words], proxies that are not attended to; None without proxies.
        density: visited blocks over all blocks, mean over heads and rows, a tensor with one number.
        chosen: bool [B, n, visual_q, visual_k], tiles of the heads that have a selector; None where none has.
    """

    lists: BlockLists
    rows: int
    head_group: Tensor
    hidden: Tensor | None
    density: Tensor
    chosen: Tensor | None


def choose_tiles(
    tiles: Tiles,
    patterns: Sequence[Pattern],
    chosen: Tensor | None,
    static: Mapping[Pattern, Tensor],
    proxies: ProxyTable | None,
    density: Tensor | None = None,
) -> Choice:
    """Build the lists of a layer.

    Args:
        tiles: of the layout.
        patterns: one per head.
        chosen: bool [B, n, visual_q, visual_k], tiles of the n heads whose pattern is a `Selector`, in the order of
            the heads; None where there is none.
        static: tiles of every other pattern but `Skip`, bool [visual_q, visual_k].
        proxies: to say which are hidden; None without proxies.
        density: of the result, where it is known; None: it is worked out.
    """
    device = tiles.q_order.device
    positions = [p for p in dict.fromkeys(patterns) if not isinstance(p, (Selector, Skip))]
    group, groups = [], len(positions)
    for pattern in patterns:
        if isinstance(pattern, Selector):
            group.append(groups)
            groups += 1
        else:
            group.append(-1 if isinstance(pattern, Skip) else positions.index(pattern))
    fixed = [static[pattern] for pattern in positions]
    maps = torch.stack(fixed)[None] if fixed else None
    if chosen is not None:
        maps = chosen if maps is None else torch.cat([maps.expand(len(chosen), -1, -1, -1), chosen], 1)
    if maps is None:
        maps = torch.zeros(1, 0, tiles.visual_q, tiles.visual_k, dtype=torch.bool, device=device)
    kept, capacity = tiles.with_extra(maps), _capacity(tiles, patterns, maps, chosen)
    rows = len(kept)
    head_group = _table(tuple(group), device)
    each = tuple(-1 if number < 0 else row * groups + number for row in range(rows) for number in group)
    lists = lists_from_map(
        kept.flatten(0, 1),
        q_len=tiles.layout.tokens,
        k_len=tiles.layout.tokens,
        block_q=tiles.block_q,
        block_k=tiles.block_k,
        q_order=tiles.q_order,
        k_order=tiles.k_order,
        head_group=_table(each, device),
        boxes=tiles.boxes,
        capacity=capacity,
    )
    if density is None:
        shares = torch.nn.functional.pad(kept.float().mean((0, 2, 3)), (0, 1))  # the last one: skipped heads
        density = shares[head_group.long()].mean()
    return Choice(
        lists=lists,
        rows=rows,
        head_group=head_group,
        hidden=None if proxies is None else proxies.hidden(kept),
        density=density,
        chosen=chosen,
    )


class ByContent(NamedTuple):
    """Heads of a layer that have the same selector."""

    name: str  # in the plan's table
    selector: Selector
    heads: list[int]
    places: list[int]  # of these heads, among all heads that have a selector

    def of(self, chosen: Tensor) -> Tensor:
        """The tiles of these heads, out of bool [B, all heads that have a selector, visual_q, visual_k]."""
        if len(self.places) == chosen.shape[1]:
            return chosen
        return torch.stack([chosen[:, place] for place in self.places], 1)


def by_content(names: Sequence[str], patterns: Sequence[Pattern]) -> list[ByContent]:
    """Gather the heads of a layer by selector.

    Args:
        names: one per head, in the plan's table.
        patterns: one per head.
    """
    found: dict[str, ByContent] = {}
    place = 0
    for head, (name, pattern) in enumerate(zip(names, patterns, strict=True)):
        if isinstance(pattern, Selector):
            one = found.setdefault(name, ByContent(name, pattern, [], []))
            one.heads.append(head)
            one.places.append(place)
            place += 1
    return list(found.values())


def choose_by_content(
    call: Call,
    tiles: Tiles,
    names: Sequence[str],
    patterns: Sequence[Pattern],
    lse: Tensor | None,
    kept: Tensor | None,
    laid: Laid | None = None,
) -> Tensor | None:
    """Choose the tiles of the heads that have a selector.

    Args:
        call: of attention.
        tiles: of the layout.
        names: one per head, in the plan's table.
        patterns: one per head.
        lse: [B, H, N], of dense attention; None where only pooled scores are made.
        kept: an earlier result, of which the heads whose choice is reused keep theirs; None: all choose.
        laid: the call in the order of the tiles, where it has means; pooled scores are made of them.

    Returns:
        bool [B, heads with a selector, visual_q, visual_k]; None where no head has one.
    """
    chosen: dict[int, Tensor] = {}
    alike: dict[tuple[str, int, int], list[ByContent]] = {}  # one launch for all heads whose scores are made in one way
    for one in by_content(names, patterns):
        if one.selector.reused and kept is not None:
            chosen |= {place: kept[:, place] for place in one.places}
        else:
            alike.setdefault((one.selector.score, one.selector.sample, one.selector.parts), []).append(one)
    for group in alike.values():
        heads = sorted(head for one in group for head in one.heads)
        scores = _scores(call, tiles, group[0].selector, heads, lse, laid)
        if all(_plain(one.selector) for one in group):
            number = {head: kept_tiles(one.selector.shares[1], tiles.visual_k) for one in group for head in one.heads}
            new = choose_top_k(scores, _counts(tuple(number[head] for head in heads), scores.device))
            if not chosen and len(alike) == 1:
                return new
            places = sorted(place for one in group for place in one.places)
            chosen |= {place: new[:, index] for index, place in enumerate(places)}
            continue
        for one in group:
            rows = [heads.index(head) for head in one.heads]
            own = scores if len(group) == 1 else torch.stack([scores[:, row] for row in rows], 1)
            new = select(one.selector, own)
            chosen |= {place: new[:, index] for index, place in enumerate(one.places)}
    return torch.stack([chosen[place] for place in range(len(chosen))], 1) if chosen else None


def _plain(selector: Selector) -> bool:
    """Whether each row keeps its highest tiles, a number that is known."""
    return isinstance(selector, TopK) and not selector.spread


def _counts(counts: tuple[int, ...], device: torch.device) -> int | Tensor:
    """How many tiles heads keep, as `choose_top_k` takes it."""
    return counts[0] if len(set(counts)) == 1 else _table(counts, device)


def _scores(
    call: Call, tiles: Tiles, selector: Selector, heads: list[int], lse: Tensor | None, laid: Laid | None
) -> Tensor:
    """Scores of the tiles of the grid for some heads, fp32 [B, n, visual_q, visual_k]."""
    if not selector.reused and laid is not None and laid.parts:
        scores = scores_of_laid(laid, tiles, selector.parts)[..., : tiles.visual_q, : tiles.visual_k]
        return scores if len(heads) == scores.shape[1] else torch.stack([scores[:, head] for head in heads], 1)
    part = call.heads(heads)
    if not selector.reused:
        return pooled_tiles(part, tiles, selector)[..., : tiles.visual_q, : tiles.visual_k]
    if lse is not None and part is not call:
        lse = torch.stack([lse[:, head] for head in heads], 1)
    scores = block_scores(
        part.q,
        part.k,
        lse,
        q_order=tiles.q_order,
        k_order=tiles.k_order,
        block_q=tiles.block_q,
        block_k=tiles.block_k,
        kind=selector.score,
        sample=selector.sample,
        key_bias=part.bias,
        scale=call.scale,
    )
    return scores[..., : tiles.visual_q, : tiles.visual_k]


def select(selector: Selector, scores: Tensor) -> Tensor:
    """Choose tiles by their scores.

    Args:
        selector: how many.
        scores: fp32 [B, n, visual_q, visual_k], of the heads that have this selector.

    Returns:
        bool, of the same shape.

    Raises:
        TypeError: a selector that is not known.
    """
    tiles = scores.shape[-1]
    if isinstance(selector, TopP):
        return choose_top_p(scores, selector.mass, kept_tiles(selector.least, tiles), kept_tiles(selector.most, tiles))
    if not isinstance(selector, TopK):
        raise TypeError(f"selector: wanted TopK or TopP, got {type(selector).__name__}")
    count = kept_tiles(selector.share, tiles)
    if not selector.spread:
        return choose_top_k(scores, count)
    return choose_per_head(scores, count / tiles, max(1, count // _SPREAD), min(tiles, count * _SPREAD))


@lru_cache(maxsize=256)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as a table on the device, int32; kept, since copying it there waits for the device."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _capacity(tiles: Tiles, patterns: Sequence[Pattern], maps: Tensor, chosen: Tensor | None) -> int:
    """The most blocks in a row of the lists, on average over rows."""
    if chosen is None:  # these lists are made once, so the device may be waited for
        visited = int(maps.sum())
        groups = maps.shape[1]
    else:
        by_content = [pattern for pattern in patterns if isinstance(pattern, Selector)]
        positions = maps.shape[1] - len(by_content)
        visited = sum(kept_tiles(pattern.shares[1], tiles.visual_k) for pattern in by_content) * tiles.visual_q
        visited += positions * tiles.visual_q * tiles.visual_k
        groups = maps.shape[1]
    extra_q, extra_k = tiles.n_q - tiles.visual_q, tiles.n_k - tiles.visual_k
    visited += groups * (tiles.visual_q * extra_k + extra_q * tiles.n_k)
    return min(tiles.n_k, max(1, -(-visited // (max(groups, 1) * tiles.n_q))))
