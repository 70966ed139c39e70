"""Window: the grid is cut into windows, and queries see their own (Swin)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from visparse.layout import Grid
from visparse.patterns.axiswise import Axiswise
from visparse.patterns.lengths import Lengths, at_most, check_lengths, in_proportion, on_grid


@dataclass(frozen=True, kw_only=True)
class Window(Axiswise):
    """Window attention: the grid is cut into windows without overlap, and a query sees the keys of its own window.

    Where an axis is no multiple of the window, its last window is cut. The published code of Swin pads the end of such
    an axis instead, and its queries see the padding; PT-DiT does not say. On an axis shorter than the window Video Swin
    takes the whole axis; here that is an error. A single number stands for all axes that are longer than 1.

    On another grid: the window follows its axis in proportion, rounded half up, at least 1. The number of windows then
    stays, as in PT-DiT; Swin keeps the window instead.

    Args:
        window: tokens per window, int or (frames, height, width); at most the axis. Swin takes 7, Video Swin (8, 7, 7).

    Raises:
        TypeError: a value is not an int.
        ValueError: a value below 1.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2 (W-MSA); Video Swin Transformer, arXiv 2106.13230, section
        3.2; PT-DiT, arXiv 2409.04005, texture complement module.
    """

    name: ClassVar[str] = "window"

    window: Lengths

    def __post_init__(self) -> None:
        """Check the values."""
        check_lengths("window", self.window)

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError where the window is longer than its axis."""
        at_most("window", on_grid(self.window, grid), grid, grid, "the length of the axis")

    def axis_pairs(self, axis: int, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Say which pairs of places are kept; see `Axiswise.axis_pairs`."""
        window = on_grid(self.window, grid)[axis]
        return q // window == k // window

    def rescale(self, source: Grid, target: Grid) -> "Window":
        """Return the pattern for another grid; see the class."""
        self.check_grid(source)
        if source == target:
            return self
        return replace(self, window=in_proportion(on_grid(self.window, source), source, target))


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("window", window=2)
