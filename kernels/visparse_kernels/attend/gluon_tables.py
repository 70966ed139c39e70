"""What the Hopper kernel needs of order tables and boxes alone: where blocks start, which have padding, who is served.

Found once for a set of tables, which takes waits for the device, and kept for all lists that share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits
from visparse_kernels.boxes import Box
from visparse_kernels.lists import BlockLists
from visparse_kernels.same import Same

_T = TypeVar("_T")


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
        masked: whether an entry of these groups may have a mask.
    """

    heads: Tensor
    groups: Tensor
    q_box: Box | None
    k_box: Box | None
    q_runs: bool
    k_runs: bool
    masked: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Order tables and boxes as the kernel sees them; all groups share the key blocks.

    Args:
        k_starts: int64 [n_k], where each key block starts; see `pack_starts`.
        k_masks: int32 [n_k], row of ``tiles`` that hides the padding of a key block, or -1 where it has none.
        tiles: int32 [m, block_q, block_k / 32], a bit mask for each kind of padding.
        ragged: whether any key block has padding.
        q_starts: int64 [G or 1, n_q], where each query block starts.
        q_whole: int32 [G or 1, n_q], whether all slots of a query block hold tokens.
        q_runs: whether a query block is a run, for each row of ``q_starts``.
        k_runs: whether a key block is.
    """

    k_starts: Tensor
    k_masks: Tensor
    tiles: Tensor
    ragged: bool
    q_starts: Tensor
    q_whole: Tensor
    q_runs: tuple[bool, ...]
    k_runs: bool


def tables_of(lists: BlockLists) -> Tables:
    """Return what the order tables and boxes of some lists come to; the last 16 results are kept, with their tables.

    Args:
        lists: with boxes, and one table of key blocks for all groups. Do not change a table.
    """
    boxes = lists.boxes
    if boxes is None or len(lists.k_order) > 1:
        raise ValueError("lists: wanted boxes, and one row in k_order; build other lists' programs with build_program")
    order = Same(lists.q_order), Same(lists.k_order)
    return _tables(*order, Same(boxes.q_starts), Same(boxes.k_starts), lists.block_q, lists.block_k)


@lru_cache(maxsize=16)
def _tables(q_order: Same, k_order: Same, q_starts: Same, k_starts: Same, block_q: int, block_k: int) -> Tables:
    q_real = (q_order.tensor >= 0).view(len(q_order.tensor), -1, block_q)
    k_real = (k_order.tensor >= 0).view(-1, block_k)
    ragged = ~k_real.all(-1)
    kinds, kind = torch.unique(pack_bits(k_real[ragged]), dim=0, return_inverse=True)
    masks = torch.full_like(ragged, -1, dtype=torch.int32)
    masks[ragged] = kind.to(torch.int32)
    return Tables(
        k_starts=pack_starts(k_starts.tensor)[0],
        k_masks=masks,
        tiles=kinds[:, None].repeat(1, block_q, 1),
        ragged=len(kinds) > 0,
        q_starts=pack_starts(q_starts.tensor),
        q_whole=q_real.all(-1).to(torch.int32),
        q_runs=tuple(has_runs(q_starts.tensor)),
        k_runs=has_runs(k_starts.tensor)[0],
    )


def parts_of(lists: BlockLists, tables: Tables) -> tuple[tuple[Part, ...], bool]:
    """Return the launches that serve the heads of lists without masks, and whether a head is skipped.

    Args:
        lists: the lists; the last 256 results are kept, with ``head_group``. Do not change it.
        tables: what `tables_of` returns for them.
    """
    assert lists.boxes is not None  # `tables_of` has seen to it
    return _parts(Same(lists.head_group), tables, lists.boxes.q_box, lists.boxes.k_box)


@lru_cache(maxsize=256)
def _parts(
    head_group: Same, tables: Tables, q_box: tuple[Box | None, ...], k_box: tuple[Box | None, ...]
) -> tuple[tuple[Part, ...], bool]:
    return sort_heads(head_group.tensor, q_box, k_box, tables.q_runs, (tables.k_runs,), (tables.ragged,))


def sort_heads(
    head_group: Tensor,
    q_box: tuple[Box | None, ...],
    k_box: tuple[Box | None, ...],
    q_runs: Sequence[bool],
    k_runs: Sequence[bool],
    masked: Sequence[bool],
) -> tuple[tuple[Part, ...], bool]:
    """Sort heads by the shapes of their groups' boxes. What is told of groups has one element where it holds for all.

    Args:
        head_group: int32 [H], group of each head, -1 for a skipped head.
        q_box: shape of the query boxes; None: runs only.
        k_box: the same for keys.
        q_runs: whether a query block is a run.
        k_runs: whether a key block is.
        masked: whether an entry may have a mask.

    Returns:
        The parts, and whether a head is skipped.
    """
    groups = head_group.tolist()
    by_shape: dict[tuple[Box | None, Box | None], list[int]] = {}
    for head, group in enumerate(groups):
        if group >= 0:
            by_shape.setdefault((_of(q_box, group), _of(k_box, group)), []).append(head)
    parts = []
    for (q_shape, k_shape), heads in by_shape.items():
        mine = [groups[head] for head in heads]
        parts.append(
            Part(
                heads=torch.tensor(heads, dtype=torch.int32, device=head_group.device),
                groups=torch.tensor(mine, dtype=torch.int32, device=head_group.device),
                q_box=q_shape,
                k_box=k_shape,
                q_runs=any(_of(q_runs, group) for group in mine),
                k_runs=any(_of(k_runs, group) for group in mine),
                masked=any(_of(masked, group) for group in mine),
            )
        )
    return tuple(parts), min(groups, default=0) < 0


def _of(told: Sequence[_T], group: int) -> _T:
    return told[group if len(told) > 1 else 0]


def has_runs(starts: Tensor) -> list[bool]:
    """Say for each row of a table of origins, int32 [rows, n, 3], whether a block of it is a run."""
    runs: list[bool] = (starts[..., 0] < 0).any(-1).tolist()
    return runs


def pack_starts(starts: Tensor) -> Tensor:
    """Pack origins into 64 bits: frame (negative for a run) from bit 48 on, row from bit 32 on, column or token below.

    Args:
        starts: int32 [..., 3].

    Returns:
        int64 [...].
    """
    frame, row, column = starts.long().unbind(-1)
    return (frame << 48) | (row << 32) | column
