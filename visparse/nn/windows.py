"""Windows: a grid of tokens cut into windows of equal size, padded where they hang over."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from visparse.layout import Grid
from visparse.patterns.lengths import Lengths, at_most, on_grid


@dataclass(frozen=True)
class Windows:
    """A grid cut into windows, with padding before and behind each axis.

    Args:
        grid: (frames, height, width), in tokens.
        window: tokens per window on each axis.
        ahead: padding in front of each axis, less than the window.
    """

    grid: Grid
    window: Grid
    ahead: Grid

    @classmethod
    def of(cls, grid: Grid, window: Lengths, *, shifted: bool = False) -> "Windows":
        """Cut a grid as `visparse.patterns.Window` does, or, shifted, as `ShiftedWindow` does with half a window.

        Args:
            grid: (frames, height, width), in tokens.
            window: tokens per window, int or (frames, height, width).
            shifted: the first window has half as many tokens, rounded down, except where one window is the whole axis.

        Raises:
            ValueError: the window is longer than its axis.
        """
        sides = on_grid(window, grid)
        at_most("window", sides, grid, grid, "the length of the axis")
        frames, height, width = (
            side - side // 2 if shifted and 1 < side < axis else 0 for side, axis in zip(sides, grid, strict=True)
        )
        return cls(grid, sides, (frames, height, width))

    @property
    def counts(self) -> Grid:
        """Windows on each axis."""
        frames, height, width = (
            -(-(axis + ahead) // side) for axis, ahead, side in zip(self.grid, self.ahead, self.window, strict=True)
        )
        return frames, height, width

    @property
    def padded(self) -> bool:
        """Whether any window holds padding."""
        return any(count * side != axis for count, side, axis in zip(self.counts, self.window, self.grid, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """Cut a sequence into windows; padding is 0.

        Args:
            x: [B, tokens of the grid, C], row-major.

        Returns:
            [B, windows, tokens per window, C].
        """
        x = x.unflatten(1, self.grid)
        edges = list(zip(self.ahead, self.grid, self.counts, self.window, strict=True))
        if self.padded:
            sides = [(ahead, count * side - axis - ahead) for ahead, axis, count, side in reversed(edges)]
            x = pad(x, (0, 0, *(length for side in sides for length in side)))
        for axis, (_, _, count, side) in enumerate(edges):
            x = x.unflatten(1 + 2 * axis, (count, side))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`; what lies in the padding is dropped."""
        x = x.unflatten(2, self.window).unflatten(1, self.counts).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        (t, h, w), (frames, height, width) = self.ahead, self.grid
        return x[:, t : t + frames, h : h + height, w : w + width].flatten(1, 3)

    def real(self, device: torch.device) -> Tensor:
        """Say which places of the windows hold tokens, bool [windows, tokens per window]."""
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        return self.split(torch.ones(1, tokens, 1, device=device))[0, :, :, 0] > 0
