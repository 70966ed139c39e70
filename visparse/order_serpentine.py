"""Serpentine order: strips of a grid, walked to and fro, so that any run of it is a compact tile without padding."""

from math import prod

import torch
from torch import Tensor

from visparse.layout import Grid, coordinates


def serpentine_order(grid: Grid, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the tokens of a grid along a curve whose runs are compact.

    Frames and rows are cut into bands of nearly equal length, about as long as the side of a cube of one block (of a
    square, in a picture). A strip is one band of frames and one of rows; it is walked along the width, all tokens of a
    place together, and the next strip in the other direction. So a run goes on where it meets an end, and tiles of any
    number of tokens fill any grid: only the last has padding, where boxes may hang over on every axis.

    Args:
        grid: (frames, height, width), in tokens.
        block: tokens of a tile.
        device: where the table is built.

    Returns:
        int64 [tokens], row-major indices.
    """
    at = coordinates(torch.arange(prod(grid), device=device), grid)
    bands = _bands(grid, block)
    frame_band, row_band = (at[:, axis] * bands[axis] // grid[axis] for axis in (0, 1))
    strip = frame_band * bands[1] + torch.where(frame_band % 2 == 0, row_band, bands[1] - 1 - row_band)
    column = torch.where(strip % 2 == 0, at[:, 2], grid[2] - 1 - at[:, 2])
    place = strip * grid[2] + column
    return (place * prod(grid[:2]) + at[:, 0] * grid[1] + at[:, 1]).argsort()


def _bands(grid: Grid, block: int) -> tuple[int, int]:
    """Numbers of bands of frames and of rows."""
    found, left = [], float(block)
    for axis in (0, 1):
        axes = sum(length > 1 for length in grid[axis:])
        side = left ** (1 / max(axes, 1)) if grid[axis] > 1 else 1.0
        found.append(max(1, round(grid[axis] / side)))
        left = max(1.0, left * found[-1] / grid[axis])
    return found[0], found[1]


def halve_tiles(tokens: Tensor, grid: Grid, times: int) -> Tensor:
    """Sort the tokens of each tile so that its halves, quarters and so on are compact too.

    A cell is cut into halves across its longest axis, and these again.

    Args:
        tokens: int64 [tiles, block], row-major indices; -1 is padding, which stays behind all tokens of its tile.
        grid: (frames, height, width), in tokens.
        times: how often tiles are halved; ``block`` is divisible by 2 ** times.

    Returns:
        int64 [tiles, block], the same tokens.
    """
    for level in range(times):
        cells = tokens.view(len(tokens) << level, -1)
        real = (cells >= 0)[..., None]
        at = coordinates(cells.clamp(min=0), grid)
        high, low = at.masked_fill(~real, -1).amax(1), at.masked_fill(~real, max(grid)).amin(1)
        axis = (high - low).argmax(1)
        key = at.gather(2, axis[:, None, None].expand(-1, cells.shape[1], 1))[..., 0]
        order = key.masked_fill(~real[..., 0], max(grid)).argsort(dim=1, stable=True)
        tokens = cells.gather(1, order).view(len(tokens), -1)
    return tokens
