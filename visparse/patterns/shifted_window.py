"""ShiftedWindow: windows whose borders lie inside those of `Window` (Swin)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.axiswise import Axiswise
from visparse.patterns.base import AXES
from visparse.patterns.lengths import Lengths, at_most, check_lengths, in_proportion, on_grid, three


@dataclass(frozen=True, kw_only=True)
class ShiftedWindow(Axiswise):
    """Shifted window attention: a query sees the keys of its own window, and the first window has ``shift`` tokens.

    The published code shifts the picture cyclically by ``shift``, so that the tokens at the beginning of an axis come
    to lie in the last window, and masks pairs there that were not neighbours. What remains are windows that begin at
    ``shift``, ``shift + window`` and so on, cut at both borders; nothing is seen across a border. That mask is -100 in
    the published code; here such pairs are not kept at all. An axis that is one whole window is not shifted.

    Where an axis is no multiple of the window, the last window is cut earlier; the published code pads the end of the
    axis before the shift, and its queries see the padding. A single number stands for all axes that are longer than 1.

    On another grid: the window follows its axis in proportion, rounded half up, at least 1. A shift that was given does
    so too, and stays below the window.

    Args:
        window: tokens per window, int or (frames, height, width); at most the axis.
        shift: tokens in the first window, int or (frames, height, width); below the window. None takes half the window,
            rounded down, as Swin does; PT-DiT does not say.

    Raises:
        TypeError: a value is not an int.
        ValueError: a window below 1, or a shift below 0 or not below the window.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2 (SW-MSA); Video Swin Transformer, arXiv 2106.13230, section
        3.2; PT-DiT, arXiv 2409.04005, texture complement module.
    """

    name: ClassVar[str] = "shifted_window"

    window: Lengths
    shift: Lengths | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_lengths("window", self.window)
        if self.shift is None:
            return
        check_lengths("shift", self.shift, least=0)
        for axis, window, shift in zip(AXES, three(self.window), three(self.shift), strict=True):
            if shift >= window:
                raise ValueError(
                    f"shift: wanted less than the window on every axis, got shift {shift} and window {window} "
                    f"on {axis}; lower the shift to {window - 1} or less"
                )

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where the window is longer than its axis."""
        at_most("window", on_grid(self.window, grid), grid, grid, "the length of the axis")

    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places are kept; see `Axiswise.axis_pairs`."""
        window = on_grid(self.window, grid)[axis]
        ahead = 0 if window == grid[axis] else window - self._shifts(grid)[axis]
        return (q + ahead) // window == (k + ahead) // window

    def rescale(self, source: Grid, target: Grid) -> "ShiftedWindow":
        """Return the pattern for another grid; see the class."""
        self.check_grid(source)
        if source == target:
            return self
        windows = in_proportion(on_grid(self.window, source), source, target)
        if self.shift is None:
            return replace(self, window=windows)
        frames, height, width = (
            min(window - 1, (2 * shift * new + old) // (2 * old))
            for window, shift, old, new in zip(windows, self._shifts(source), source, target, strict=True)
        )
        return replace(self, window=windows, shift=(frames, height, width))

    def _shifts(self, grid: Grid) -> tuple[int, int, int]:
        """Shift on every axis, at most one token less than the window."""
        windows = on_grid(self.window, grid)
        given = tuple(window // 2 for window in windows) if self.shift is None else on_grid(self.shift, grid, short=0)
        frames, height, width = (min(shift, window - 1) for shift, window in zip(given, windows, strict=True))
        return frames, height, width


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("shifted_window", window=2)
