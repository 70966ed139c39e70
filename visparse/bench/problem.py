"""One problem of the benchmark: tensors of a case and the block lists of a pattern."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from visparse.bench.cases import Case
from visparse.bench.patterns import build_lists
from visparse.bench.random_blocks import grain_of
from visparse_kernels import BlockLists
from visparse_kernels.boxes import Boxes


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


class Problem:
    """A case with a pattern; lists at other block sizes, for peers, are built when asked for.

    Args:
        inputs: the tensors.
        pattern: one of `cases.PATTERNS`.
        blocks: (block_q, block_k) of the lists that visparse gets.

    Attributes:
        lists: those lists.
        compile_seconds: time that building them took, the device waited for.
    """

    def __init__(self, inputs: Inputs, pattern: str, blocks: tuple[int, int]) -> None:
        """Build the lists."""
        self.inputs = inputs
        self.case = inputs.case
        self.pattern = pattern
        self._grain = (grain_of(blocks[0]), grain_of(blocks[1]))
        self._lists: dict[tuple[int, int], BlockLists] = {}
        _wait(inputs.q)
        begin = time.perf_counter()
        self.lists = self.lists_at(*blocks)
        _wait(inputs.q)
        self.compile_seconds = time.perf_counter() - begin

    def lists_at(self, block_q: int, block_k: int) -> BlockLists:
        """The same pairs in blocks of another size.

        Raises:
            ValueError: the pattern cannot be had in this size.
        """
        key = (block_q, block_k)
        if key not in self._lists:
            self._lists[key] = build_lists(
                self.pattern,
                self.case,
                block_q=block_q,
                block_k=block_k,
                grain=self._grain,
                device=self.inputs.q.device,
            )
        return self._lists[key]

    @cached_property
    def density(self) -> float:
        """Kept pairs / all pairs."""
        return self.lists.density

    @cached_property
    def block_density(self) -> float:
        """Visited blocks / the blocks that dense attention visits at this block size: what is paid for."""
        lists, case = self.lists, self.case
        visited = float(lists.block_density_per_head.mean()) * lists.n_q * lists.n_k
        return visited / (-(-case.tokens // lists.block_q) * -(-case.tokens // lists.block_k))


def list_bytes(lists: BlockLists) -> int:
    """Memory of block lists with all their tables, in bytes."""
    tables = [getattr(lists, field.name) for field in fields(lists)]
    boxes = lists.boxes
    if isinstance(boxes, Boxes):
        tables += [getattr(boxes, field.name) for field in fields(boxes)]
    return sum(table.numel() * table.element_size() for table in tables if isinstance(table, Tensor))


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
