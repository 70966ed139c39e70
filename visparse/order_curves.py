"""Space-filling curves through a grid: tokens that are near on the curve are near in the grid."""

from math import prod

import torch
from torch import Tensor

from visparse.layout import Grid, coordinates

CURVES = ("pixel-major", "z-order", "hilbert")


def curve_order(name: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Return the tokens of a grid in the order of a curve.

    ``"pixel-major"``: all frames of a place together, places in row-major order. ``"z-order"`` and ``"hilbert"``: the
    curve through the smallest enclosing power of two, with the places outside the grid left out. Axes of length 1 take
    no part in these two, so a picture has the flat curve.

    Args:
        name: one of `CURVES`.
        grid: (frames, height, width), in tokens.
        device: where the table is built.

    Returns:
        int64 [tokens], row-major indices.

    Source: Morton, A computer oriented geodetic data base, 1966 (Z-order); Skilling, Programming the Hilbert curve,
    AIP Conference Proceedings 707, 2004.
    """
    index = torch.arange(prod(grid), device=device)
    if name == "pixel-major":
        return index.view(grid[0], -1).T.flatten()
    at = coordinates(index, grid)
    places = [at[:, axis] for axis, length in enumerate(grid) if length > 1]
    if len(places) < 2:
        return index
    bits = (max(grid) - 1).bit_length()
    key = _interleave(places, bits) if name == "z-order" else _hilbert(places, bits)
    return key.argsort()


def _hilbert(places: list[Tensor], bits: int) -> Tensor:
    """Undo the turns and flips of the curve from the coarsest cell to the finest; then the place is in Gray code."""
    x = list(places)
    for level in range(bits - 1, 0, -1):
        low = (1 << level) - 1
        for axis in range(len(x)):
            upper = (x[axis] >> level & 1).bool()
            swap = (x[0] ^ x[axis]) & low
            x[axis], x[0] = torch.where(upper, x[axis], x[axis] ^ swap), torch.where(upper, x[0] ^ low, x[0] ^ swap)
    for axis in range(1, len(x)):
        x[axis] = x[axis] ^ x[axis - 1]
    flips = torch.zeros_like(x[0])
    for level in range(bits - 1, 0, -1):
        flips = torch.where((x[-1] >> level & 1).bool(), flips ^ ((1 << level) - 1), flips)
    return _interleave([part ^ flips for part in x], bits)


def _interleave(parts: list[Tensor], bits: int) -> Tensor:
    """Make one number of several: the highest bit of each part, then the next of each."""
    key = torch.zeros_like(parts[0])
    for level in range(bits - 1, -1, -1):
        for part in parts:
            key = key << 1 | part >> level & 1
    return key
