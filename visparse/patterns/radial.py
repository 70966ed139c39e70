"""Radial: a band around the same place in other frames, thinner the further the frame."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from visparse.errors import nearest
from visparse.layout import Grid
from visparse.patterns.base import Factor, Pattern
from visparse.patterns.radial_band import band_alike, band_cover, band_pairs
from visparse.patterns.radial_blocks import block_map, check_frame
from visparse.patterns.tables import table_on


@dataclass(frozen=True, kw_only=True)
class Radial(Pattern):
    """Radial attention. The band is one-dimensional: distance of places counted in row-major order inside the frame.

    ``variant="paper"`` is equation 4. With frame distance D, ``g = floor(log2(max(D, 1)))`` and s tokens a frame,
    places k and l see each other where ``2^g <= s`` and ``|k - l| + 1 <= s / 2^g``, or where ``k = l`` and D is a
    multiple of ``ceil(2^g / s)``. ``variant="code"`` is the rule of the published program, which keeps or drops whole
    blocks and keeps about twice as much; see `visparse.patterns.radial_blocks` for it and for what is added to it.

    On another grid: nothing changes. The band is a share of the frame, it gets thinner by the distance in frames, and
    the block is a size of the published kernel. A longer video is therefore sparser; the published settings raise the
    decay with the length (0.2 for 18 frames, 1.0 for twice as many), which is left to the user. Frames too small for
    the block are an error.

    Args:
        variant: ``"paper"`` or ``"code"``.
        decay: factor on the width of the band, only for ``"code"``.
        sink: whether every query sees the whole first frame.
        block: tokens per block, only for ``"code"``.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown variant, a decay or block that is not positive, or one that the paper's rule has not.

    Source: Radial Attention, arXiv 2506.19852, equation 4; github.com/mit-han-lab/radial-attention.
    """

    name: ClassVar[str] = "radial"

    variant: str = "paper"
    decay: float = 1.0
    sink: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        """Check the values."""
        if self.variant not in ("paper", "code"):
            raise ValueError(
                f"variant: wanted 'paper' or 'code', got {self.variant!r}"
                f"{nearest(str(self.variant), ['paper', 'code'])}"
            )
        for field, kinds in (("decay", (int, float)), ("sink", (bool,)), ("block", (int,))):
            value = getattr(self, field)
            if type(value) not in kinds:
                raise TypeError(f"{field}: wanted {kinds[-1].__name__}, got {type(value).__name__} {value!r}")
        if not 0 < self.decay < float("inf"):
            raise ValueError(f"decay: wanted a positive finite number, got {self.decay}; 1.0 leaves the width as it is")
        if self.block < 1:
            raise ValueError(f"block: wanted at least 1 token, got {self.block}; the published code uses 128")
        if self.variant == "paper" and (self.decay, self.block) != (1.0, 128):
            raise ValueError(
                f"decay, block: the paper's rule has neither, got {self.decay} and {self.block}; "
                "use decay=1.0 and block=128 with it, or variant='code'"
            )

    def pairs(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs are kept; see `Pattern.pairs`."""
        if self.variant == "code":
            q_block, k_block = (
                ((at[..., 0] * grid[1] + at[..., 1]) * grid[2] + at[..., 2]) // self.block for at in (q, k)
            )
            kept = table_on(q.device, block_map, grid, float(self.decay), self.sink, self.block)
            return kept[q_block, k_block]
        return band_pairs(q, k, grid, self.sink)

    def factors(self, grid: Grid) -> tuple[Factor, ...] | None:
        """Return the block map of the published code; the paper's rule is not separable."""
        if self.variant == "paper":
            return None
        blocks = block_map(grid, float(self.decay), self.sink, self.block)
        return (Factor(torch.arange(prod(grid)) // self.block, blocks),)

    def cover(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Bound what is kept between blocks of tokens; see `Pattern.cover`."""
        return super().cover(q, k, grid) if self.variant == "code" else band_cover(q, k, grid, self.sink)

    def alike(self, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor, grid: Grid) -> Tensor | None:
        """Number the blocks of the paper's rule by mask; see `Pattern.alike`."""
        return None if self.variant == "code" else band_alike(q, k, rows, cols, grid, self.sink)

    def rescale(self, source: Grid, target: Grid) -> "Radial":
        """Return the same pattern, if the target suits it; see `Pattern.rescale`."""
        if self.variant == "code":
            check_frame(target, self.block)
        return self


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("radial")
