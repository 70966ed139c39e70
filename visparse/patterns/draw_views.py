"""What drawings are made of: a mask in cells, and what one query sees; and both as text for a terminal."""

from __future__ import annotations

import torch
from torch import Tensor

from visparse.layout import Grid, Layout, coordinates
from visparse.patterns.base import AXES, Pattern

SAMPLES = 32
"""Pairs that are looked at in each cell of a mask that is too large to be computed whole."""

_EXACT = 4096  # tokens; the whole mask is their square
_SHADES = " ░▒▓█"


def mask_cells(pattern: Pattern, grid: Grid, most: int) -> tuple[Tensor, str]:
    """Return the mask of a grid in at most ``most`` cells on a side.

    Args:
        pattern: what to draw.
        grid: (frames, height, width), in tokens.
        most: cells on a side.

    Returns:
        fp32 [cells, cells], share of kept pairs of each cell, query by key, in row-major order; and what a cell is, in
        words. Up to 4,096 tokens the shares are exact. Above, `SAMPLES` pairs of each cell are looked at, drawn at
        random, always the same ones.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    tokens = Layout(grid).visual
    if tokens <= _EXACT:
        at = Layout(grid).coordinates()
        kept = pattern.keep(at, at, grid).float()
        if tokens <= most:
            return kept, "pair"
        return torch.nn.functional.interpolate(kept[None, None], size=(most, most), mode="area")[
            0, 0
        ], "cell of several pairs"
    make = torch.Generator().manual_seed(0)
    edges = torch.arange(most + 1) * tokens // most
    first, sizes = edges[:-1], edges.diff()
    kept = torch.zeros(most, most)
    for _ in range(SAMPLES):
        q, k = (first + (torch.rand(most, generator=make) * sizes).long() for _ in range(2))
        kept += pattern.keep(coordinates(q, grid), coordinates(k, grid), grid)
    return kept / SAMPLES, f"cell of many pairs, {SAMPLES} of them looked at"


def seen_keys(pattern: Pattern, grid: Grid, query: Grid) -> Tensor:
    """Return the keys that one query sees, bool [frames, height, width].

    Args:
        pattern: what to draw.
        grid: (frames, height, width), in tokens.
        query: its place (frame, row, column).

    Raises:
        ValueError: the place is not in the grid, or the pattern does not fit it.
    """
    for axis, place, length in zip(AXES, query, grid, strict=True):
        if not 0 <= place < length:
            raise ValueError(
                f"query: wanted a place inside the grid {grid}, got {query}; on the {axis} axis use 0 to {length - 1}"
            )
    at = Layout(grid).coordinates()
    return pattern.keep(torch.tensor([query]), at, grid).view(grid)


def middle(grid: Grid) -> Grid:
    """The place in the middle of a grid."""
    return grid[0] // 2, grid[1] // 2, grid[2] // 2


def mask_text(pattern: Pattern, grid: Grid, most: int = 48) -> str:
    """Draw the mask in shades, queries down, keys across, two characters a cell."""
    cells, _ = mask_cells(pattern, grid, most)
    return _shaded(cells, 2)


def seen_text(pattern: Pattern, grid: Grid, query: Grid, columns: int = 100) -> str:
    """Draw what one query sees, frames beside each other; those nearest to the query where not all fit.

    Args:
        pattern: what to draw.
        grid: (frames, height, width), in tokens.
        query: its place (frame, row, column); it is marked Q.
        columns: width of the text.
    """
    seen = seen_keys(pattern, grid, query).float()
    scale = max(1, -(-grid[2] // 32))
    height, width = -(-grid[1] // scale), -(-grid[2] // scale)
    small = torch.nn.functional.interpolate(seen[None], size=(height, width), mode="area")[0]
    count = min(grid[0], max(1, columns // (width + 2)))
    first = min(max(query[0] - count // 2, 0), grid[0] - count)
    frames = []
    for frame in range(first, first + count):
        rows = [list(row) for row in _shaded(small[frame], 1).split("\n")]
        if frame == query[0]:
            rows[query[1] * height // grid[1]][query[2] * width // grid[2]] = "Q"
        frames.append([f"t={frame}".ljust(width)[:width], *("".join(row) for row in rows)])
    return "\n".join("│".join(parts) for parts in zip(*frames, strict=True))


def _shaded(cells: Tensor, times: int) -> str:
    """Write shares as shades; only none is blank, and only all is solid."""
    level = (cells * 3).ceil().long().clamp(max=3).masked_fill(cells >= 1, 4)
    return "\n".join("".join(_SHADES[shade] * times for shade in row) for row in level.tolist())
