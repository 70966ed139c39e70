"""Choice: the tiles that the heads of a layer see exactly, by position and by content, as block lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from visparse.compensation.proxy_table import ProxyTable
from visparse.compensation.tiles import Tiles
from visparse.patterns import Pattern, Selector, Skip, TopK, TopP
from visparse_kernels import BlockLists, choose_per_head, choose_top_k, choose_top_p, lists_from_map

_SPREAD = 4  # a block of queries keeps at most so many times the mean, and at least the mean over this


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a layer sees exactly.

    Attributes:
        lists: one for all rows of the batch, or one for each.
        hidden: int32 [1 or B, G, n_q, words], proxies that are not attended to; None without proxies.
        density: visited blocks over all blocks, mean over heads and rows, a tensor with one number.
        chosen: bool [B, n, visual_q, visual_k], tiles of the heads that have a selector; None where none has.
    """

    lists: tuple[BlockLists, ...]
    hidden: Tensor | None
    density: Tensor
    chosen: Tensor | None


def choose_tiles(
    tiles: Tiles,
    patterns: Sequence[Pattern],
    chosen: Tensor | None,
    static: Mapping[Pattern, Tensor],
    proxies: ProxyTable | None,
) -> Choice:
    """Build the lists of a layer.

    Args:
        tiles: of the layout.
        patterns: one per head.
        chosen: bool [B, n, visual_q, visual_k], tiles of the n heads whose pattern is a `Selector`, in the order of
            the heads; None where there is none.
        static: tiles of every other pattern but `Skip`, bool [visual_q, visual_k].
        proxies: to say which are hidden; None without proxies.
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
    head_group = _head_group(tuple(group), device)
    fixed = [static[pattern] for pattern in positions]
    maps = torch.stack(fixed)[None] if fixed else None
    if chosen is not None:
        maps = chosen if maps is None else torch.cat([maps.expand(len(chosen), -1, -1, -1), chosen], 1)
    if maps is None:
        maps = torch.zeros(1, 0, tiles.visual_q, tiles.visual_k, dtype=torch.bool, device=device)
    kept, capacity = tiles.with_extra(maps), _capacity(tiles, patterns, maps, chosen)
    lists = tuple(
        lists_from_map(
            row,
            q_len=tiles.layout.tokens,
            k_len=tiles.layout.tokens,
            block_q=tiles.block_q,
            block_k=tiles.block_k,
            q_order=tiles.q_order,
            k_order=tiles.k_order,
            head_group=head_group,
            boxes=tiles.boxes,
            capacity=capacity,
        )
        for row in kept
    )
    shares = torch.nn.functional.pad(kept.float().mean((0, 2, 3)), (0, 1))  # the last one: skipped heads
    return Choice(
        lists=lists,
        hidden=None if proxies is None else proxies.hidden(kept),
        density=shares[head_group.long()].mean(),
        chosen=chosen,
    )


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
        return choose_top_p(scores, selector.mass, _count(selector.least, tiles), _count(selector.most, tiles))
    if not isinstance(selector, TopK):
        raise TypeError(f"selector: wanted TopK or TopP, got {type(selector).__name__}")
    count = _count(selector.share, tiles)
    if not selector.spread:
        return choose_top_k(scores, count)
    return choose_per_head(scores, count / tiles, max(1, count // _SPREAD), min(tiles, count * _SPREAD))


@lru_cache(maxsize=64)
def _head_group(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """The groups as a table on the device; kept, since copying it there waits for the device."""
    return torch.tensor(groups, dtype=torch.int32, device=device)


def _count(share: float, tiles: int) -> int:
    return min(tiles, max(1, round(share * tiles)))


def _capacity(tiles: Tiles, patterns: Sequence[Pattern], maps: Tensor, chosen: Tensor | None) -> int:
    """The most blocks in a row of the lists, on average over rows."""
    if chosen is None:  # these lists are made once, so the device may be waited for
        visited = int(maps.sum())
        groups = maps.shape[1]
    else:
        by_content = [pattern for pattern in patterns if isinstance(pattern, Selector)]
        positions = maps.shape[1] - len(by_content)
        visited = sum(_count(pattern.shares[1], tiles.visual_k) for pattern in by_content) * tiles.visual_q
        visited += positions * tiles.visual_q * tiles.visual_k
        groups = maps.shape[1]
    extra_q, extra_k = tiles.n_q - tiles.visual_q, tiles.n_k - tiles.visual_k
    visited += groups * (tiles.visual_q * extra_k + extra_q * tiles.n_k)
    return min(tiles.n_k, max(1, -(-visited // (max(groups, 1) * tiles.n_q))))
