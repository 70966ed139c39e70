"""One problem of the benchmark: tensors of a case and the block lists of a pattern."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from visparse.bench.cases import Case
from visparse.bench.patterns import build_lists
from visparse_kernels import BlockLists, preferred_blocks, prefers_boxes


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Queries, keys and values of a case, `[batch, tokens, heads, head_dim]`, random normal."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device | str, dtype: torch.dtype, seed: int) -> Inputs:
        """Draw the inputs of a case on the device."""
        make = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        q, k, v = (torch.randn(shape, generator=make, device=device, dtype=dtype) for _ in range(3))
        return cls(case=case, q=q, k=k, v=v)

    @cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, contiguous as `[batch, heads, tokens, head_dim]`, for peers that want them so."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))
        return q, k, v


@dataclass(frozen=True, kw_only=True)
class Built:
    """Block lists and what they cost.

    Args:
        lists: the lists.
        seconds: time that building them took, the device waited for.
    """

    lists: BlockLists
    seconds: float

    @cached_property
    def block_density(self) -> float:
        """Visited blocks / the blocks that dense attention visits at this block size: what is paid for."""
        return self.lists.block_density

    @cached_property
    def bytes(self) -> int:
        """Memory of the lists with all their tables."""
        tables = [
            getattr(part, field.name) for part in (self.lists, self.lists.boxes) if part for field in fields(part)
        ]
        return sum(table.numel() * table.element_size() for table in tables if isinstance(table, Tensor))


class Problem:
    """A case with a pattern; lists of any block size are built when asked for, and keep the same pairs.

    Args:
        inputs: the tensors.
        pattern: one of `cases.PATTERNS`.
        blocks: (block_q, block_k) of the lists that visparse gets; None: what runs fastest.

    Attributes:
        grain: sizes in which random blocks are drawn: they can be cut into the blocks of every contender.
    """

    def __init__(self, inputs: Inputs, pattern: str, blocks: tuple[int, int] | None = None) -> None:
        """Choose block sizes; nothing is built yet."""
        q = inputs.q
        self.inputs = inputs
        self.case = inputs.case
        self.pattern = pattern
        self._best = blocks or preferred_blocks(q.device, self.case.head_dim, q.dtype)
        self._boxes = prefers_boxes(q.device, self.case.head_dim, q.dtype)
        usual = (128, 64) if self.case.head_dim <= 128 else (64, 64)
        self._plain = blocks or (usual if q.is_cuda else self._best)
        of_peers = (128, 128) if q.is_cuda else (1, 1)
        self.grain = (
            math.lcm(self._best[0], self._plain[0], of_peers[0]),
            math.lcm(self._best[1], self._plain[1], of_peers[1]),
        )
        self._built: dict[tuple[int, int, bool], Built] = {}

    @property
    def plain(self) -> Built:
        """Lists that say by order tables where tokens lie, at the usual block sizes."""
        return self.built(*self._plain)

    @property
    def best(self) -> Built:
        """Lists as `preferred_blocks` and `prefers_boxes` want them."""
        return self.built(*self._best, boxes=self._boxes)

    def built(self, block_q: int, block_k: int, *, boxes: bool = False) -> Built:
        """Lists of one form; built once.

        Raises:
            ValueError: the pattern cannot be had in this form.
        """
        key = (block_q, block_k, boxes)
        if key not in self._built:
            _wait(self.inputs.q)
            begin = time.perf_counter()
            lists = build_lists(
                self.pattern,
                self.case,
                block_q=block_q,
                block_k=block_k,
                boxes=boxes,
                grain=self.grain,
                device=self.inputs.q.device,
            )
            _wait(self.inputs.q)
            self._built[key] = Built(lists=lists, seconds=time.perf_counter() - begin)
        return self._built[key]

    @cached_property
    def density(self) -> float:
        """Kept pairs / all pairs."""
        return self.plain.lists.density


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
