"""TemporalHead: near places in all frames, and the first frame."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from visparse.errors import nearest
from visparse.layout import Grid
from visparse.patterns.line import LinePattern, pixel_major
from visparse.patterns.spatial_head import check_svg, svg_reach

_SINKS = ("frame", "order", "none")


@dataclass(frozen=True, kw_only=True)
class TemporalHead(LinePattern):
    """Temporal heads of Sparse VideoGen: the band of `SpatialHead`, after tokens were put in pixel-major order.

    In that order a token has the index ``place * frames + frame``, so the band holds near places in all frames. Width
    and rounding are those of `SpatialHead`.

    The sink is ``"frame"``, the first frame, which both kinds of heads are meant to keep. The published program for Wan
    runs one mask for both kinds: it keeps the first tokens, as many as a frame has, of the order that the head
    has, and for temporal heads these are the first places in all frames. That is ``"order"``. The program for
    HunyuanVideo has no sink: ``"none"``. Text is seen by all and sees all, which is so for every pattern here.

    On another grid: the width follows the number of frames, so that the density stays.

    Args:
        width: half the band, in tokens of a frame: any number above 0 and at most the frames of the grid;
            `visparse.patterns.spatial_head.svg_width` gives the published one for a density.
        sink: ``"frame"``, ``"order"`` or ``"none"``.
        rounding: ``"up"`` (Wan) or ``"down"`` (HunyuanVideo, CogVideoX).

    Raises:
        TypeError: the width is no number.
        ValueError: a width that is not positive, or an unknown sink or rounding.

    Source: Sparse VideoGen, arXiv 2502.01776; svg/models of github.com/svg-project/Sparse-VideoGen.
    """

    name: ClassVar[str] = "temporal_head"

    width: float
    sink: str = "frame"
    rounding: str = "up"

    def __post_init__(self) -> None:
        """Check the values."""
        check_svg(self.width, self.rounding)
        if self.sink not in _SINKS:
            raise ValueError(
                f"sink: wanted 'frame', 'order' or 'none', got {self.sink!r}{nearest(str(self.sink), _SINKS)}; "
                "'frame' keeps the first frame"
            )

    def place(self, at: Tensor, grid: Grid) -> Tensor:
        """Return the pixel-major index; see `LinePattern.place`."""
        return pixel_major(at, grid)

    def near(self, distance: Tensor, grid: Grid) -> Tensor:
        """Keep the band; see `LinePattern.near`."""
        return distance <= svg_reach(self.width, self.rounding, grid)

    def always(self, k: Tensor, grid: Grid) -> Tensor | None:
        """Return the sink; see `LinePattern.always`."""
        if self.sink == "none":
            return None
        return k[..., 0] == 0 if self.sink == "frame" else self.place(k, grid) < grid[1] * grid[2]

    def rescale(self, source: Grid, target: Grid) -> "TemporalHead":
        """Return the band that is the same share of the frames; see `Pattern.rescale`."""
        return replace(self, width=min(self.width * target[0] / source[0], target[0]))


if __name__ == "__main__":
    from visparse.patterns.draw import main

    main("temporal_head", width=1)
