"""Pattern: a rule, fixed by position, that says which keys a query sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from visparse.errors import check_keys
from visparse.layout import Grid, Layout, coordinates

AXES = ("frames", "height", "width")

P = TypeVar("P", bound="Pattern")


class Factor(NamedTuple):
    """One factor of a separable pattern: a pair is kept where ``table[code[q], code[k]]`` is true in every factor.

    Args:
        code: int64 [visual], a small code of each token of the grid, in row-major order.
        table: bool [codes, codes], query code by key code.
    """

    code: Tensor
    table: Tensor


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """Base of all patterns. A pattern is immutable, hashable and knows no grid until it is asked.

    A subclass is a frozen keyword-only dataclass with a ``name``; `pairs` is its definition. It may override `axes`,
    `factors`, `cover` or `alike` to be compiled faster; all must agree with `pairs`. `rescale` says what becomes of it
    on another grid.
    """

    name: ClassVar[str]

    @abstractmethod
    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say of pairs of tokens whether they are kept; the definition of the pattern.

        Args:
            q: int64 [..., 3], coordinates (frame, row, column) of queries.
            k: int64 [..., 3], coordinates of keys; the axes in front are broadcast against those of ``q``.
            grid: (frames, height, width), in tokens.

        Returns:
            bool, of the broadcast shape.

        Raises:
            ValueError: the pattern does not fit the grid.
        """

    def keep(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which of all pairs are kept.

        Args:
            q: int64 [nq, 3], coordinates (frame, row, column) of queries.
            k: int64 [nk, 3], coordinates of keys.
            grid: (frames, height, width), in tokens.

        Returns:
            bool [nq, nk].

        Raises:
            ValueError: the pattern does not fit the grid.
        """
        return self.pairs(q[:, None], k[None], grid)

    def mask_mod(
        self, layout: Layout, device: torch.device | str = "cpu"
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return the pattern as FlexAttention wants it: a function of (batch, head, query, key) indices of tokens.

        Extra tokens see everything and are seen by everything.

        Args:
            layout: grid and extra tokens.
            device: where it will be called.

        Returns:
            The function, for ``torch.nn.attention.flex_attention.create_block_mask``.

        Raises:
            ValueError: the pattern does not fit the grid.
        """
        first, last = layout.before, layout.before + layout.visual
        at = torch.zeros(1, 3, dtype=torch.int64, device=device)
        self.pairs(at, at, layout.grid)  # raises here, not inside FlexAttention, where it does not fit

        def mask(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            extra = (q_index < first) | (q_index >= last) | (k_index < first) | (k_index >= last)
            q, k = (_Places((index - first).clamp(0, layout.visual - 1), layout.grid) for index in (q_index, k_index))
            return extra | self.pairs(cast(Tensor, q), cast(Tensor, k), layout.grid)

        return mask

    def rescale(self, source: Grid, target: Grid) -> "Pattern":
        """Return the pattern that does on another grid what this one does on its own.

        Lengths that a pattern counts in tokens follow their axis in proportion where its docstring says so; by
        default nothing changes.

        Args:
            source: grid that the pattern was made for.
            target: grid that it shall serve.

        Raises:
            ValueError: nothing sensible fits the target.
        """
        return self

    def axes(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return one table per axis of the grid, or None where the pattern is no product over the axes.

        Args:
            grid: (frames, height, width), in tokens.

        Returns:
            bool [length, length] of frames, height and width, on the CPU: a pair is kept where all three tables hold
            at (query, key).

        Raises:
            ValueError: the pattern does not fit the grid.
        """
        return None

    def factors(self, grid: Grid) -> tuple[Factor, ...] | None:
        """Return the pattern as a product of small tables, or None where it is not separable.

        Args:
            grid: (frames, height, width), in tokens.

        Raises:
            ValueError: the pattern does not fit the grid.
        """
        tables = self.axes(grid)
        if tables is None:
            return None
        at = coordinates(torch.arange(prod(grid)), grid)
        return tuple(Factor(at[:, axis], table) for axis, table in enumerate(tables))

    def cover(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Bound what is kept between blocks of tokens.

        Args:
            q: int64 [n_q, block_q], row-major indices of the tokens in each query block; -1 is padding.
            k: int64 [n_k, block_k], the same for keys.
            grid: (frames, height, width), in tokens.

        Returns:
            ``some, every``, bool [n_q, n_k]: where ``some`` is false no pair is kept; where ``every`` is true all
            pairs of real tokens are.

        Raises:
            ValueError: the pattern does not fit the grid.
        """
        some = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
        every = some.clone()
        factors = self.factors(grid)
        if factors is None:
            return some, ~every
        for code, table in factors:
            code, table = code.to(q.device), table.to(q.device)
            q_has, k_has = presence(q, code, len(table)), presence(k, code, len(table))
            kept = q_has @ table.to(q_has) @ k_has.T  # kept pairs of codes, at most block_q * block_k: exact in fp32
            some &= kept > 0
            every &= kept == q_has.sum(1)[:, None] * k_has.sum(1)
        return some, every

    def alike(self, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid) -> Tensor | None:
        """Number pairs of blocks so that equal numbers mean equal masks, or return None where nothing is known.

        Args:
            q: int64 [n_q, block_q], row-major indices of the tokens in each query block; -1 is padding.
            k: int64 [n_k, block_k], the same for keys.
            rows: int64 [n], query block of each pair.
            cols: int64 [n], its key block.
            grid: (frames, height, width), in tokens.

        Returns:
            int64 [n]. Equal masks may have different numbers.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as JSON values; `visparse.patterns.pattern_from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls: type[P], data: Mapping[str, Any]) -> P:
        """Build this pattern from what `to_dict` gave.

        Args:
            data: fields, and ``name`` if it is there.

        Raises:
            ValueError: an unknown or missing key, the name of another pattern, or a bad value.
            TypeError: a value of the wrong type.
        """
        values = dict(data)
        name = values.pop("name", cls.name)
        if name != cls.name:
            raise ValueError(f"name: wanted {cls.name!r}, got {name!r}; read it with pattern_from_dict")
        check_keys(values, [field.name for field in fields(cls)], f"pattern {cls.name!r}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in values:
                raise ValueError(f"pattern {cls.name!r} lacks the key {field.name!r}; give it a value")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


class _Places:
    """Coordinates whose ``[..., axis]`` is arithmetic on indices: compiled FlexAttention gathers rows wrongly."""

    def __init__(self, index: Tensor, grid: Grid) -> None:
        _, height, width = grid
        self.device = index.device
        self._axes = (index // (height * width), index // width % height, index % width)

    def __getitem__(self, at: tuple[object, int]) -> Tensor:
        return self._axes[at[1]]


def presence(blocks: Tensor, code: Tensor, codes: int) -> Tensor:
    """Say which codes occur in which blocks.

    Args:
        blocks: int64 [n, block], row-major indices of tokens; -1 is padding.
        code: int64 [visual], code of each token.
        codes: number of codes.

    Returns:
        fp32 [n, codes], 1 where a real token of the block has the code, else 0.
    """
    has = code.new_zeros(len(blocks), codes + 1, dtype=torch.float32)
    has.scatter_(1, code[blocks.clamp(min=0)].masked_fill(blocks < 0, codes), 1.0)
    return has[:, :codes]
