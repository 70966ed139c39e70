"""visparse itself, once for each implementation of `attend`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from visparse.bench.contenders.base import Contender
from visparse.bench.contenders.slots import Slots, no_slots
from visparse.bench.problem import Built, Problem
from visparse_kernels import BlockLists, Boxes, attend, explain

_MASK = 2**28  # pairs that the reference may expand


class Ours(Contender):
    """`attend` with one implementation, by name.

    Args:
        impl: name of the implementation.
    """

    def __init__(self, impl: str) -> None:
        """Name it."""
        self.impl = impl
        self.name = f"visparse:{impl}"

    def built(self, problem: Problem) -> Built:
        """What runs fastest on this device for the implementation that `auto` takes; for others the usual blocks."""
        q = problem.inputs.q
        best, plain = problem.best, problem.plain
        taken = next(name for name, usable, _ in explain(q, best.lists) if usable)
        return best if taken == self.impl or self._obstacle(q, plain.lists) else plain

    def can_run(self, problem: Problem) -> str | None:
        """What `explain` says; and the reference expands the whole mask, so only small problems."""
        case = problem.case
        if self.impl == "reference" and case.tokens**2 * case.heads > _MASK:
            return f"expands the whole mask; timed up to {_MASK} pairs"
        return self._obstacle(problem.inputs.q, self.built(problem).lists)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Nothing to prepare: lists are compiled once per layout in a model too."""
        inputs, lists = problem.inputs, self.built(problem).lists
        return cast(Callable[[], Tensor], partial(attend, inputs.q, inputs.k, inputs.v, lists, impl=self.impl))

    def facts(self, problem: Problem) -> dict[str, Any]:
        """Implementation, block sizes, and whether blocks are boxes of the grid."""
        lists = self.built(problem).lists
        boxes = lists.boxes is not None
        return {"impl": self.impl, "block_q": lists.block_q, "block_k": lists.block_k, "boxes": boxes}

    def _obstacle(self, q: Tensor, lists: BlockLists) -> str | None:
        return next((None if usable else why) for name, usable, why in explain(q, lists) if name == self.impl)


class Pretiled(Ours):
    """The same blocks, from memory in which every block is contiguous: what fetching from row-major memory costs.

    Args:
        impl: name of the implementation.
    """

    only = ("gna_strided",)

    def __init__(self, impl: str) -> None:
        """Name it."""
        super().__init__(impl)
        self.name = f"visparse:{impl}:pretiled"

    def can_run(self, problem: Problem) -> str | None:
        """As the implementation; and there must be something to put into tiles."""
        reason = super().can_run(problem)
        lists = self.built(problem).lists
        if reason is not None or no_slots(lists) is not None:
            return reason or no_slots(lists)
        return "tokens lie in blocks already" if Slots(lists).plain else None

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Put tokens into slots; order tables then say where there is no token, and every block is a run."""
        lists, inputs = self.built(problem).lists, problem.inputs
        slots = Slots(lists)
        q, k, v = slots.queries(inputs.q, 1), slots.keys(inputs.k, 1), slots.keys(inputs.v, 1)
        tiled = replace(
            lists,
            q_len=q.shape[1],
            k_len=k.shape[1],
            q_order=_in_place(lists.q_order),
            k_order=_in_place(lists.k_order),
            boxes=_all_runs(lists),
        )
        return cast(Callable[[], Tensor], partial(attend, q, k, v, tiled, impl=self.impl))

    def tokens(self, problem: Problem, out: Tensor) -> Tensor:
        """Take the slots that hold a token."""
        return Slots(self.built(problem).lists).tokens(out, 1)


def _in_place(order: Tensor) -> Tensor:
    slots = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.where(order >= 0, slots, -1)


def _all_runs(lists: BlockLists) -> Boxes:
    """Say that every block is a run, so that slots without a token are allowed anywhere."""

    def starts(order: Tensor, block: int) -> Tensor:
        first = torch.arange(0, order.shape[1], block, dtype=torch.int32, device=order.device)
        return torch.stack([torch.full_like(first, -1), torch.zeros_like(first), first], -1).expand(len(order), -1, -1)

    return Boxes(
        grid=(1, 1, 1),
        first=0,
        q_box=(None,) * len(lists.q_order),
        k_box=(None,) * len(lists.k_order),
        q_starts=starts(lists.q_order, lists.block_q).contiguous(),
        k_starts=starts(lists.k_order, lists.block_k).contiguous(),
    )


def all_ours() -> list[Contender]:
    """Two contenders for each implementation that `explain` knows: on tokens as they are, and put into tiles before."""
    lists = BlockLists.dense(q_len=1, k_len=1, heads=1, block_q=32, block_k=32)
    names = [name for name, _, _ in explain(torch.zeros(1, 1, 1, 8), lists)]
    return [kind(name) for name in names for kind in (Ours, Pretiled)]
