"""Boxes: blocks of tokens that lie in a grid in row-major memory, so that hardware can fetch them without an index."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

Box = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """Say where in a grid the blocks of `BlockLists` lie; the order tables say the same, token by token.

    A block is a *box* of the grid, with its origin anywhere, or a *run* of consecutive tokens. Slot s of a box holds
    the token at origin + (s-th place of the box, in row-major order), or padding where that is outside the grid. Slot
    s of a run holds token ``origin + s``, or padding.

    Tables have one row for all groups, or one per group, as the order tables do.

    Args:
        grid: (frames, height, width), in tokens.
        first: token at which the grid begins; the rest of the sequence is reached by runs.
        q_box: shape (frames, height, width) of the query boxes of each table row, ``block_q`` tokens; None where the
            row has only runs.
        k_box: the same for keys, ``block_k`` tokens.
        q_starts: int32 [rows, n_q, 3], origin (frame, row, column) of each query block; (-1, 0, token) is a run.
        k_starts: int32 [rows, n_k, 3], the same for keys.

    Raises:
        TypeError: a table is not an int32 tensor.
        ValueError: a shape does not fit.
    """

    grid: Box
    first: int
    q_box: tuple[Box | None, ...]
    k_box: tuple[Box | None, ...]
    q_starts: Tensor
    k_starts: Tensor

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        for name, boxes in (("q_starts", self.q_box), ("k_starts", self.k_box)):
            starts = getattr(self, name)
            if not isinstance(starts, Tensor) or starts.dtype != torch.int32:
                got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
                raise TypeError(f"{name}: wanted an int32 tensor, got {got}; convert it with .to(torch.int32)")
            if starts.ndim != 3 or starts.shape[0] != len(boxes) or starts.shape[2] != 3:
                raise ValueError(
                    f"{name}: wanted [{len(boxes)}, blocks, 3] (a row for each box shape), got {list(starts.shape)}; "
                    "give (frame, row, column) of every block"
                )

    def runs(self, length: int, block: int) -> int:
        """Return how many runs the sequence takes: the grid and what lies before and behind it, each cut by itself.

        Args:
            length: tokens of the sequence.
            block: slots per block.
        """
        parts = (self.first, prod(self.grid), length - self.first - prod(self.grid))
        return sum(-(-part // block) for part in parts)

    def to(self, device: torch.device | str) -> "Boxes":
        """Return the same boxes on another device."""
        return replace(self, q_starts=self.q_starts.to(device), k_starts=self.k_starts.to(device))

    @property
    def numbers(self) -> list[int]:
        """Everything but the tables, as numbers; a shape that is None becomes three zeros."""
        shapes = [side for box in (*self.q_box, *self.k_box) for side in box or (0, 0, 0)]
        return [*self.grid, self.first, *shapes]

    @classmethod
    def from_numbers(cls, numbers: list[int], q_starts: Tensor, k_starts: Tensor) -> "Boxes":
        """Undo `numbers`."""
        sides = iter(numbers)
        grid = (next(sides), next(sides), next(sides))
        first = next(sides)
        shapes = [box if any(box) else None for box in zip(sides, sides, sides, strict=True)]
        rows = len(q_starts)
        return cls(
            grid=grid,
            first=first,
            q_box=tuple(shapes[:rows]),
            k_box=tuple(shapes[rows:]),
            q_starts=q_starts,
            k_starts=k_starts,
        )


def box_tokens(grid: Box, first: int, box: Box, starts: Tensor) -> Tensor:
    """List the tokens of boxes.

    Args:
        grid: (frames, height, width), in tokens.
        first: token at which the grid begins.
        box: (frames, height, width) of every box.
        starts: int [n, 3], their origins; none is negative.

    Returns:
        int32 [n, tokens of a box]; -1 is padding.
    """
    size = torch.tensor(grid, device=starts.device)
    places = torch.cartesian_prod(*(torch.arange(length, device=starts.device) for length in box)).view(-1, 3)
    at = starts.long()[:, None] + places
    inside = (at < size).all(-1)
    token = first + (at[..., 0] * size[1] + at[..., 1]) * size[2] + at[..., 2]
    return torch.where(inside, token, -1).to(torch.int32)


def check_boxes(name: str, boxes: Boxes, order: Tensor, block: int) -> None:
    """Raise where the boxes and an order table disagree; reads them all.

    Args:
        name: ``"q"`` or ``"k"``.
        boxes: the boxes.
        order: int32 [rows, n * block], slot -> token, -1 is padding.
        block: slots per block.

    Raises:
        ValueError: a table row or a block of it does not lie where the boxes say.
    """
    shapes, starts = (boxes.q_box, boxes.q_starts) if name == "q" else (boxes.k_box, boxes.k_starts)
    if starts.shape[:2] != (order.shape[0], order.shape[1] // block):
        raise ValueError(
            f"boxes: wanted {name}_starts [{order.shape[0]}, {order.shape[1] // block}, 3], as {name}_order has "
            f"blocks, got {list(starts.shape)}; give one origin per block"
        )
    for row, (box, origin) in enumerate(zip(shapes, starts, strict=True)):
        tokens = order[row].view(-1, block)
        run = origin[:, 0] < 0
        wanted = origin[:, 2:] + torch.arange(block, device=order.device, dtype=torch.int32)
        wrong = run[:, None] & (tokens >= 0) & (tokens != wanted)
        if box is not None:
            if prod(box) != block:
                raise ValueError(f"boxes: wanted {name}_box of {block} tokens, got {box}; multiply its sides")
            wrong |= ~run[:, None] & (box_tokens(boxes.grid, boxes.first, box, origin.clamp(min=0)) != tokens)
        elif bool((~run).any()):
            raise ValueError(f"boxes: {name}_box of row {row} is None, so wanted only runs, got a box; give its shape")
        if bool(wrong.any()):
            block_at, slot = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"boxes: block {block_at} of {name}_order (row {row}) holds token {int(tokens[block_at, slot])} in "
                f"slot {slot}, but its box begins at {origin[block_at].tolist()}; build both from the same origins"
            )
