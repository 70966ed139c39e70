"""Block lists as the Hopper kernel walks them: one merged list of starts and masks, with every padding slot masked.

Made once for a set of lists, on their device, and kept as long as their tables live.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits
from visparse_kernels.boxes import Box
from visparse_kernels.lists import BlockLists


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Heads that one launch serves: their groups share the shapes of their boxes.

    Args:
        heads: int32 [n], the heads.
        groups: int32 [n], their groups.
        q_box: (frames, height, width) of query boxes; None for runs only.
        k_box: the same for keys.
        q_runs: whether a query block of these groups is a run.
        k_runs: whether a key block is.
        masked: whether an entry of these groups has a mask.
    """

    heads: Tensor
    groups: Tensor
    q_box: Box | None
    k_box: Box | None
    q_runs: bool
    k_runs: bool
    masked: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """What the kernel reads; n entries, and one more that nothing points to, so that reading ahead stays inside.

    Args:
        offsets: int32 [G * n_q + 1], first entry of each row (group * n_q + query block).
        starts: int64 [n + 1], where the key block of each entry starts; see `pack_starts`.
        unmasked: int32 [G * n_q], how many entries of each row have no mask; these come first.
        masks: int32 [n + 1], its row in ``tiles``, or -1.
        blocks: int32 [n + 1], its key block.
        tiles: int32 [m, block_q, block_k / 32], bit masks; bits of padding are 0.
        q_starts: int64 [G or 1, n_q], where each query block starts.
        q_whole: int32 [G or 1, n_q], whether all slots of a query block hold tokens.
        parts: one launch each.
        skipped: whether a head is in no part.
    """

    offsets: Tensor
    unmasked: Tensor
    starts: Tensor
    masks: Tensor
    blocks: Tensor
    tiles: Tensor
    q_starts: Tensor
    q_whole: Tensor
    parts: tuple[Part, ...]
    skipped: bool


# tables by identity -> the program, and the tables, so that no other object can take their place in memory
_programs: dict[tuple[int, ...], tuple[Program | str, tuple[Tensor, ...]]] = {}


def program_of(lists: BlockLists) -> Program | str:
    """Return the program of some lists, or why there is none; kept as long as ``full_offsets`` lives.

    Args:
        lists: the block lists; lists whose tables are the same objects share one program. Do not change a table.
    """
    tables = [lists.head_group, lists.q_order, lists.k_order, lists.full_indices]
    tables += [lists.partial_offsets, lists.partial_indices, lists.partial_tiles, lists.tiles]
    if lists.boxes is not None:
        tables += [lists.boxes.q_starts, lists.boxes.k_starts]
    key = (id(lists.full_offsets), *map(id, tables))
    if key not in _programs:
        _programs[key] = build_program(lists), tuple(tables)
        weakref.finalize(lists.full_offsets, _programs.pop, key, None)
    return _programs[key][0]


def build_program(lists: BlockLists) -> Program | str:
    """Merge the lists, mask the padding, and pack where blocks start; a text says which block cannot be fetched."""
    if lists.boxes is None:
        q_starts, k_starts = run_starts(lists.q_order, lists.block_q), run_starts(lists.k_order, lists.block_k)
        for name, starts in (("query", q_starts), ("key", k_starts)):
            if bool((starts[..., 2] < 0).any()):
                return f"the {name} order is made of neither runs nor boxes; compile the lists with boxes=True"
        q_box: tuple[Box | None, ...] = (None,)
        k_box: tuple[Box | None, ...] = (None,)
    else:
        q_starts, k_starts, q_box, k_box = (
            lists.boxes.q_starts,
            lists.boxes.k_starts,
            lists.boxes.q_box,
            lists.boxes.k_box,
        )
    row, block, tile = _merge(lists)
    tiles, tile = _mask_padding(lists, row, block, tile)
    last = (row * 2 + (tile >= 0)).argsort(stable=True)
    row, block, tile = row[last], block[last], tile[last]
    group = row // lists.n_q
    counts = torch.bincount(row, minlength=lists.groups * lists.n_q)
    packed = pack_starts(k_starts)
    table = group if len(packed) > 1 else torch.zeros_like(group)
    start = packed[table, block]
    q_real = (lists.q_order >= 0).view(-1, lists.n_q, lists.block_q)
    extra = start.new_zeros(1)
    return Program(
        offsets=torch.cat([extra, counts.cumsum(0)]).to(torch.int32),
        unmasked=torch.bincount(row[tile < 0], minlength=len(counts)).to(torch.int32),
        starts=torch.cat([start, packed[0, :1]]),
        masks=torch.cat([tile, extra - 1]).to(torch.int32),
        blocks=torch.cat([block, extra]).to(torch.int32),
        tiles=tiles,
        q_starts=pack_starts(q_starts),
        q_whole=q_real.all(-1).to(torch.int32),
        parts=_parts(lists, q_box, k_box, q_starts, k_starts, group, tile),
        skipped=bool((lists.head_group < 0).any()),
    )


def run_starts(order: Tensor, block: int) -> Tensor:
    """Find the runs in an order table.

    Args:
        order: int32 [rows, n * block], slot -> token, -1 is padding.
        block: slots per block.

    Returns:
        int32 [rows, n, 3]: (-1, 0, token of the first slot), or (-1, 0, -1) where a block is no run from its first
        slot on.
    """
    tokens = order.view(len(order), -1, block)
    first = tokens[..., :1]
    step = torch.arange(block, device=order.device, dtype=order.dtype)
    is_run = ((tokens == first + step) | (tokens < 0)).all(-1) & (first[..., 0] >= 0)
    dead = (tokens < 0).all(-1)
    start = torch.where(is_run, first[..., 0], torch.where(dead, 0, -1))
    return torch.stack([torch.full_like(start, -1), torch.zeros_like(start), start], -1)


def pack_starts(starts: Tensor) -> Tensor:
    """Pack origins into 64 bits: frame (negative for a run) from bit 48 on, row from bit 32 on, column or token below.

    Args:
        starts: int32 [..., 3].

    Returns:
        int64 [...].
    """
    frame, row, column = starts.long().unbind(-1)
    return (frame << 48) | (row << 32) | column


def _merge(lists: BlockLists) -> tuple[Tensor, Tensor, Tensor]:
    """Row, key block and tile (-1: full) of every entry, by row and key block."""
    rows = torch.arange(lists.groups * lists.n_q, device=lists.device)
    ends = (lists.full_offsets.long().diff(), lists.partial_offsets.long().diff())
    row = torch.cat([rows.repeat_interleave(counts) for counts in ends])
    full = lists.full_indices[: len(row) - len(lists.partial_indices)]
    block = torch.cat([full, lists.partial_indices]).long()
    tile = torch.cat([torch.full_like(full, -1), lists.partial_tiles]).long()
    order = (row * lists.n_k + block).argsort()
    return row[order], block[order], tile[order]


def _mask_padding(lists: BlockLists, row: Tensor, block: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Mask the padding in every entry whose key block has some; returns all tiles, and the tile of each entry."""
    real = (lists.k_order >= 0).view(-1, lists.n_k, lists.block_k)
    ragged = ~real.all(-1)
    table = row // lists.n_q if len(real) > 1 else torch.zeros_like(row)
    at = ragged[table, block].nonzero()[:, 0]
    if len(at) == 0:
        return lists.tiles, tile
    kinds, kind = torch.unique(pack_bits(real[ragged]), dim=0, return_inverse=True)
    kind_of = torch.zeros_like(ragged, dtype=torch.int64)
    kind_of[ragged] = kind
    pair, index = torch.unique((tile[at] + 1) * len(kinds) + kind_of[table[at], block[at]], return_inverse=True)
    whole = torch.full((1, *lists.tiles.shape[1:]), -1, dtype=torch.int32, device=lists.device)
    masked = torch.cat([whole, lists.tiles])[pair // len(kinds)] & kinds[pair % len(kinds)][:, None]
    tile = tile.clone()
    tile[at] = index + len(lists.tiles)
    return torch.cat([lists.tiles, masked]), tile


def _parts(
    lists: BlockLists,
    q_box: tuple[Box | None, ...],
    k_box: tuple[Box | None, ...],
    q_starts: Tensor,
    k_starts: Tensor,
    group: Tensor,
    tile: Tensor,
) -> tuple[Part, ...]:
    """Sort the heads by the shapes of their boxes."""
    masked = torch.zeros(lists.groups, dtype=torch.int64, device=lists.device)
    masked.index_add_(0, group, (tile >= 0).long())
    masks, head_group = masked.tolist(), lists.head_group.tolist()
    q_runs, k_runs = ((starts[..., 0] < 0).any(-1).tolist() for starts in (q_starts, k_starts))
    by_shape: dict[tuple[Box | None, Box | None], list[int]] = {}
    for head, number in enumerate(head_group):
        if number >= 0:
            shape = (q_box[number if len(q_box) > 1 else 0], k_box[number if len(k_box) > 1 else 0])
            by_shape.setdefault(shape, []).append(head)

    def some(flags: list[bool], numbers: list[int]) -> bool:
        return any(flags[number if len(flags) > 1 else 0] for number in numbers)

    parts = []
    for (q_shape, k_shape), heads in by_shape.items():
        numbers = [head_group[head] for head in heads]
        parts.append(
            Part(
                heads=torch.tensor(heads, dtype=torch.int32, device=lists.device),
                groups=torch.tensor(numbers, dtype=torch.int32, device=lists.device),
                q_box=q_shape,
                k_box=k_shape,
                q_runs=some(q_runs, numbers),
                k_runs=some(k_runs, numbers),
                masked=any(masks[number] for number in numbers),
            )
        )
    return tuple(parts)
