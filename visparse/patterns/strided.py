"""Strided: near blocks and every n-th block of keys, another n-th for every head."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.line import LinePattern, check_int, row_major


@dataclass(frozen=True, kw_only=True)
class Strided(LinePattern):
    """S2-Attention: each head sees its own shard of the sequence, and all heads together see all of it.

    The row-major sequence is cut into blocks. A query block sees the key blocks at a distance below ``local``, and the
    key blocks j with ``(j + shard) % stride == 0``. That is the published mask with positions counted from the start
    of the sequence ("absolute"), without its causal cut, because a diffusion transformer looks both ways. Use
    `Strided.per_head` to give every head its shard.

    On another grid: nothing changes, all lengths are counted in blocks.

    Args:
        block: tokens per block; published is 64.
        local: blocks on either side, the own one counted, that are kept, at least 1; published is 4.
        stride: key blocks from one of the shard to the next; published is 4.
        shard: which shard, from 0 to ``stride - 1``.

    Raises:
        TypeError: a value is no whole number.
        ValueError: a value out of its range.

    Source: S2-Attention, arXiv 2407.17678, section 3; masks of github.com/linxihui/dkernel.
    """

    name: ClassVar[str] = "strided"

    block: int = 64
    local: int = 4
    stride: int = 4
    shard: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_int("block", self.block, 1, "count it in tokens; 64 is published")
        check_int("local", self.local, 1, "count it in blocks; 4 is published, 1 is the own block")
        check_int("stride", self.stride, 1, "count it in blocks; 4 is published")
        check_int("shard", self.shard, 0, "shards are numbered from 0")
        if self.shard >= self.stride:
            raise ValueError(
                f"shard: wanted below stride={self.stride}, got {self.shard}; "
                "Strided.per_head numbers the shards of the heads"
            )

    @classmethod
    def per_head(cls, heads: int, *, block: int = 64, local: int = 4, stride: int = 4) -> tuple["Strided", ...]:
        """Return one pattern per head, whose shards go round.

        Head h has the shard ``h * max(1, stride // heads) % stride``, as in the published code: with fewer heads than
        shards the heads are spread over them.

        Args:
            heads: number of heads.
            block: tokens per block.
            local: blocks on either side that are kept.
            stride: number of shards.

        Returns:
            ``heads`` patterns.

        Raises:
            TypeError: a value is no whole number.
            ValueError: a value out of its range.
        """
        check_int("heads", heads, 1, "give the heads of the layer")
        check_int("stride", stride, 1, "count it in blocks; 4 is published")
        step = max(1, stride // heads)
        return tuple(cls(block=block, local=local, stride=stride, shard=head * step % stride) for head in range(heads))

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the block; see `LinePattern.place`."""
        return row_major(at, grid) // self.block

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep the near blocks; see `LinePattern.near`."""
        return distance < self.local

    def always(self, k: Tensor, grid: Grid) -> Tensor:
        """Return the shard; see `LinePattern.always`."""
        return (self.place(k, grid) + self.shard) % self.stride == 0


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("strided", block=6, local=1, stride=3)
