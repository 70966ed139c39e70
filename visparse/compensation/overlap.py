"""Overlap: how much of a choice of tiles would be chosen again, seen from a few tiles of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.choice import by_content, select
from visparse.compensation.refresh import Overlap
from visparse.compensation.tiles import Tiles
from visparse.patterns import Pattern, Selector, TopK
from visparse_kernels import BlockLists, attend, block_scores, lists_from_map, preferred_blocks
from visparse_kernels.block_scores.slots import sampled_rows

_ONE_OF = 64  # tiles of queries; of 75,600 tokens ten are looked at
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Some tiles of queries of a layout.

    Attributes:
        tiles: int64 [n], which.
        tokens: int64 [n * width], their queries, every so many; 0 for padding.
        order: int32 [n * width], place among `tokens`; -1 is padding.
        width: queries of a tile.
    """

    tiles: Tensor
    tokens: Tensor
    order: Tensor
    width: int


@lru_cache(maxsize=256)
def sample_of(tiles: Tiles, layer: int, every: int) -> Sample:
    """Take one of 64 tiles of queries, evenly over the grid, from another place for each layer; the last are cached.

    Args:
        tiles: of the layout.
        layer: index of the layer.
        every: take every so many queries of a tile.
    """
    number = -(-tiles.visual_q // _ONE_OF)
    step = tiles.visual_q / number
    first = (layer * _GOLDEN) % 1
    device = tiles.q_order.device
    some = torch.tensor([int((first + place) * step) for place in range(number)], device=device)
    rows = sampled_rows(tiles.q_order.view(-1, tiles.block_q)[some].flatten(), tiles.block_q, every)
    tokens = rows.flatten().long()
    places = torch.arange(len(tokens), dtype=torch.int32, device=device)
    return Sample(
        tiles=some,
        tokens=tokens.clamp(min=0),
        order=places.masked_fill(tokens < 0, -1),
        width=rows.shape[1],
    )


def overlaps(
    call: Call,
    tiles: Tiles,
    layer: int,
    names: Sequence[str],
    patterns: Sequence[Pattern],
    chosen: Tensor,
    impl: str,
) -> Tensor:
    """Say, for each head of a layer whose choice is followed, how much of it would be chosen again.

    Args:
        call: of attention.
        tiles: of the layout.
        layer: index of the layer.
        names: one per head, in the plan's table.
        patterns: one per head.
        chosen: bool [B, heads with a selector, visual_q, visual_k], the layer's choice.
        impl: of `attend`.

    Returns:
        fp32 [n], shares; one for each batch row, head and tile that was looked at.
    """
    shares = []
    for one in by_content(names, patterns):
        if isinstance(one.selector.refresh, Overlap):
            sample = sample_of(tiles, layer, one.selector.sample)
            shares.append(overlap(call.heads(one.heads), tiles, one.selector, one.of(chosen), sample, impl))
    return torch.cat([share.flatten() for share in shares] or [chosen.new_zeros(0, dtype=torch.float32)])


def overlap(call: Call, tiles: Tiles, selector: Selector, chosen: Tensor, sample: Sample, impl: str) -> Tensor:
    """Choose anew for some tiles of queries, and say which share of the new choice the old one has.

    Logits are exact, of the sampled queries against all keys; nothing waits for the device.

    Args:
        call: of attention, with the heads that have the selector.
        tiles: of the layout.
        selector: how tiles are chosen.
        chosen: bool [B, H, visual_q, visual_k], the old choice.
        sample: where to look.
        impl: of `attend`.

    Returns:
        fp32 [B, H, tiles of the sample], in [0, 1].
    """
    q = call.q.index_select(1, sample.tokens)
    lists = _everything(q.shape[1], q.shape[2], tiles.layout.tokens, q.shape[3], q.dtype, q.device)
    _, lse = attend(q, call.k, call.v, lists, scale=call.scale, key_bias=call.bias, return_lse=True, impl=impl)
    scores = block_scores(
        q,
        call.k,
        lse,
        q_order=sample.order,
        k_order=tiles.k_order,
        block_q=sample.width,
        block_k=tiles.block_k,
        kind=selector.score,
        key_bias=call.bias,
        scale=call.scale,
    )
    old = chosen.index_select(2, sample.tiles)
    new = choose_again(selector, scores[..., : tiles.visual_k], old)
    return (new & old).sum(-1) / new.sum(-1)


def choose_again(selector: Selector, scores: Tensor, old: Tensor) -> Tensor:
    """Choose tiles by the selector's rule, for some tiles of queries.

    A budget that is spread over all rows is not known from some of them: each row keeps as many as it had.

    Args:
        selector: how tiles are chosen.
        scores: fp32 [B, H, n, visual_k].
        old: bool, of the same shape, the old choice.

    Returns:
        bool, of the same shape.
    """
    if isinstance(selector, TopK) and selector.spread:
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return rank < old.sum(-1, keepdim=True)
    return select(selector, scores)


@lru_cache(maxsize=16)
def _everything(
    q_len: int, heads: int, k_len: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> BlockLists:
    """Lists with which some queries see all keys."""
    block_q, block_k = preferred_blocks(device, head_dim, dtype)
    orders = []
    for length, block in ((q_len, block_q), (k_len, block_k)):
        places = torch.arange(-(-length // block) * block, dtype=torch.int32, device=device)
        orders.append(places.masked_fill(places >= length, -1))
    kept = torch.ones(1, len(orders[0]) // block_q, len(orders[1]) // block_k, dtype=torch.bool, device=device)
    return lists_from_map(
        kept,
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=block_k,
        q_order=orders[0],
        k_order=orders[1],
        head_group=torch.zeros(heads, dtype=torch.int32, device=device),
    )
