"""Block lists as the Hopper kernel walks them: one merged list of starts and masks, with every padding slot masked.

Made once for a set of lists, on their device, and kept as long as their tables live. Lists of full blocks alone, which
selectors build at every step, get theirs without a wait for the device and are kept within a budget.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from visparse_kernels.attend.gluon_tables import (
    Part,
    Tables,
    has_runs,
    pack_starts,
    parts_of,
    sort_heads,
    tables_of,
)
from visparse_kernels.bits import pack_bits
from visparse_kernels.boxes import Box
from visparse_kernels.kernels_apply import kernels_apply
from visparse_kernels.lists import BlockLists

_BUDGET = 256 << 20  # bytes of programs of full blocks that are kept; more are made again at each call


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """What the kernel reads; n entries, and one or more that no row holds, so that reading ahead stays inside.

    Args:
        offsets: int32 [G * n_q + 1], first entry of each row (group * n_q + query block).
        starts: int64 [n + 1 or more], where the key block of each entry starts; see `pack_starts`.
        unmasked: int32 [G * n_q], how many entries of each row have no mask; these come first.
        masks: int32 [n + 1 or more], its row in ``tiles``, or -1.
        blocks: int32 [n + 1 or more], its key block.
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

    @property
    def nbytes(self) -> int:
        """Bytes of what is told of rows and entries."""
        return sum(x.nbytes for x in (self.offsets, self.unmasked, self.starts, self.masks, self.blocks))


# tables by identity -> the program, and the tables, so that no other object can take their place in memory
_programs: dict[tuple[int, ...], tuple[Program | str, tuple[Tensor, ...]]] = {}
# the same, with bytes, for lists of full blocks; an entry goes with its `full_offsets`, or as the oldest of too many
_full_programs: dict[tuple[int, ...], tuple[Program, int, tuple[Tensor, ...], weakref.ref[Tensor]]] = {}


def program_of(lists: BlockLists) -> Program | str:
    """Return the program of some lists, or why there is none; kept as long as ``full_offsets`` lives.

    That of lists with boxes, full blocks alone and one table of key blocks is built without a wait for the device, once
    `tables_of` knows their tables; of these programs only the newest 256 MiB are kept.

    Args:
        lists: the block lists; lists whose tables are the same objects share one program. Do not change a table.
    """
    tables = [lists.head_group, lists.q_order, lists.k_order, lists.full_indices]
    if lists.boxes is not None:
        tables += [lists.boxes.q_starts, lists.boxes.k_starts]
        if len(lists.partial_indices) == 0 and len(lists.k_order) == 1:
            return _full_program_of(lists, tuple(tables))
    tables += [lists.partial_offsets, lists.partial_indices, lists.partial_tiles, lists.tiles]
    key = (id(lists.full_offsets), *map(id, tables))
    if key not in _programs:
        _programs[key] = build_program(lists), tuple(tables)
        weakref.finalize(lists.full_offsets, _programs.pop, key, None)
    return _programs[key][0]


def _full_program_of(lists: BlockLists, tables: tuple[Tensor, ...]) -> Program:
    key = (id(lists.full_offsets), *map(id, tables))
    kept = _full_programs.get(key)
    if kept is not None:
        return kept[0]
    program = build_full_program(lists)
    size = program.nbytes
    # what is made while a CUDA graph is captured is written at each replay, and means nothing outside
    if size <= _BUDGET and not (lists.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        ref = weakref.ref(lists.full_offsets, lambda _: _full_programs.pop(key, None))
        _full_programs[key] = program, size, tables, ref
        while sum(entry[1] for entry in list(_full_programs.values())) > _BUDGET:
            _full_programs.pop(next(iter(_full_programs), key), None)
    return program


def build_full_program(lists: BlockLists) -> Program:
    """Make the program of lists of full blocks; waits for the device only where tables are new, see `tables_of`.

    Args:
        lists: without masks, with boxes, and with one table of key blocks for all groups. The lists may have room to
            spare; the program has the same.
    """
    tables = tables_of(lists)
    parts, skipped = parts_of(lists, tables)
    if kernels_apply(lists.full_indices):
        from visparse_kernels.attend.gluon_program_triton import fill_entries as fill
    else:
        fill = fill_entries
    offsets, unmasked, starts, masks, blocks = fill(lists.full_offsets, lists.full_indices, tables)
    return Program(
        offsets=offsets,
        unmasked=unmasked,
        starts=starts,
        masks=masks,
        blocks=blocks,
        tiles=tables.tiles,
        q_starts=tables.q_starts,
        q_whole=tables.q_whole,
        parts=parts,
        skipped=skipped,
    )


def fill_entries(offsets: Tensor, indices: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Make the entries of a program of full blocks.

    Args:
        offsets: int32 [rows + 1], of lists.
        indices: int32 [n], their key blocks; those behind the last offset mean nothing.
        tables: of the key blocks.

    Returns:
        ``offsets``, copied, since a program must not keep its lists alive; ``unmasked``, ``starts``, ``masks`` and
        ``blocks`` of `Program`, with n + 1 entries. That at the last offset is block 0, for who reads ahead; what lies
        behind it means nothing.
    """
    blocks = pad(indices, (0, 1))
    place = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)
    spare = place >= offsets[-1]
    blocks.masked_fill_(spare, 0)
    unmasked = offsets.diff()
    if tables.ragged:
        blocks, unmasked = _ragged_last(blocks, offsets, tables, place, spare)
    starts, masks = tables.k_starts.index_select(0, blocks), tables.k_masks.index_select(0, blocks)
    return offsets.clone(), unmasked, starts, masks, blocks


def _ragged_last(
    blocks: Tensor, offsets: Tensor, tables: Tables, place: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the blocks with padding to the ends of their rows; returns all blocks, and how many of each row have none.

    Each half keeps its order. Blocks whose place is spare stay where they are.
    """
    late = (tables.k_masks.index_select(0, blocks) >= 0) & ~spare
    # row of each place: the rows that end there or before
    ends = torch.zeros_like(place).scatter_add_(0, offsets[1:].long(), torch.ones_like(offsets[1:]))
    row = ends.cumsum(0, dtype=torch.int32)
    passed = late.cumsum(0, dtype=torch.int32) - late.to(torch.int32)
    until = passed.index_select(0, offsets)
    unmasked = offsets.diff() - until.diff()
    passed -= until.index_select(0, row)  # late blocks before this one in its row
    first_late = pad(offsets[:-1] + unmasked, (0, 1)).index_select(0, row)
    target = torch.where(late, first_late + passed, place - passed)
    return torch.empty_like(blocks).scatter_(0, target.long(), blocks), unmasked


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
    masked = torch.zeros(lists.groups, dtype=torch.int64, device=lists.device).index_add_(0, group, (tile >= 0).long())
    parts, skipped = sort_heads(
        lists.head_group, q_box, k_box, has_runs(q_starts), has_runs(k_starts), (masked > 0).tolist()
    )
    return Program(
        offsets=torch.cat([extra, counts.cumsum(0)]).to(torch.int32),
        unmasked=torch.bincount(row[tile < 0], minlength=len(counts)).to(torch.int32),
        starts=torch.cat([start, packed[0, :1]]),
        masks=torch.cat([tile, extra - 1]).to(torch.int32),
        blocks=torch.cat([block, extra]).to(torch.int32),
        tiles=tiles,
        q_starts=pack_starts(q_starts),
        q_whole=q_real.all(-1).to(torch.int32),
        parts=parts,
        skipped=skipped,
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
