"""Pictures of patterns: the mask, one query's view on the frames, a legend; one pattern or several below each other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visparse.layout import Grid, Layout
from visparse.patterns.base import Pattern
from visparse.patterns.draw_views import mask_cells, seen_keys
from visparse.patterns.skip import Skip

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 44, 52)
LINE: Colour = (190, 194, 200)
HIDDEN: Colour = (240, 241, 243)
KEPT: Colour = (38, 98, 190)
TEXT: Colour = (238, 150, 46)
QUERY: Colour = (214, 40, 57)

_GAP = 24
_NARROWEST = 620  # pixels, so that the legend has room
_FAINT = 0.25  # colour of a cell with hardly any kept pair


def pattern_picture(
    pattern: Pattern, layout: Layout, query: Grid, *, notes: Sequence[str] = (), size: int = 480
) -> Image:
    """Draw one pattern: its mask, and what one query sees on the frames.

    Args:
        pattern: what to draw.
        layout: grid and extra tokens; these are drawn as strips along the mask.
        query: place (frame, row, column) of the query whose view is drawn.
        notes: lines below the title, such as figures of an estimate.
        size: pixels of a side of the mask, at least 96.

    Returns:
        An RGB image.

    Raises:
        ValueError: the pattern does not fit the grid, or the query is outside of it.
    """
    mask, cell = _mask(pattern, layout, size)
    view = _view(pattern, layout.grid, query, size)
    width = max(mask.width + view.width + 3 * _GAP, _NARROWEST)
    grid = "x".join(map(str, layout.grid))
    extra = f" + {layout.extra} text" if layout.extra else ""
    title = textwrap.wrap(str(pattern), (width - 2 * _GAP) // 8)
    lines = [*title, f"grid {grid}{extra}; a point of the mask is a {cell}", *notes]
    top = _GAP + 20 * len(lines)
    image = _canvas(width, top + max(mask.height, view.height) + 2 * _GAP + 16)
    for number, line in enumerate(lines):
        _write(image, (_GAP, _GAP // 2 + 20 * number), line, 15 if number < len(title) else 13)
    image.paste(mask, (_GAP, top))
    image.paste(view, (2 * _GAP + mask.width, top))
    entries = [(KEPT, "kept"), (HIDDEN, "not kept"), (QUERY, f"query {query}")]
    if layout.extra:
        entries.append((TEXT, "text: skipped too" if isinstance(pattern, Skip) else "text: always visible"))
    _legend(image, (_GAP, image.height - _GAP), entries)
    return image


def stack(pictures: Sequence[Image]) -> Image:
    """Put pictures below each other, with a line between them.

    Args:
        pictures: at least one.
    """
    from PIL import ImageDraw

    image = _canvas(max(one.width for one in pictures), sum(one.height for one in pictures))
    top = 0
    for one in pictures:
        image.paste(one, (0, top))
        if top:
            ImageDraw.Draw(image).line((0, top, image.width, top), LINE)
        top += one.height
    return image


def _mask(pattern: Pattern, layout: Layout, size: int) -> tuple[Image, str]:
    """The mask with its strips of text and its labels; and what a point of it means."""
    from PIL import Image, ImageDraw

    cells, cell = mask_cells(pattern, layout.grid, size)
    scale = max(1, size // len(cells))
    side = scale * len(cells)
    before, after = (max(6, round(side * n / layout.visual)) if n else 0 for n in (layout.before, layout.after))
    before, after = min(before, side // 4), min(after, side // 4)
    whole = before + side + after
    strips = HIDDEN if isinstance(pattern, Skip) else TEXT
    colours = torch.tensor(strips, dtype=torch.uint8).expand(whole, whole, 3).clone()
    grid_colours = _blend(cells).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    colours[before : before + side, before : before + side] = grid_colours
    left, top = 34, 40
    image = _canvas(left + whole + 1, top + whole + 1)
    image.paste(Image.fromarray(colours.numpy()), (left, top))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, left + whole, top + whole), outline=LINE)
    for frame in range(layout.grid[0] + 1) if layout.grid[0] <= 48 else ():
        at = before + side * frame // layout.grid[0]
        draw.line((left + at, top - 6, left + at, top - 1), INK)
        draw.line((left - 6, top + at, left - 1, top + at), INK)
    _write(image, (left, 2), "keys, frame by frame", 13)
    down = _canvas(whole, 20)
    _write(down, (0, 2), "queries, frame by frame", 13)
    image.paste(down.rotate(270, expand=True), (2, top))
    return image, cell


def _view(pattern: Pattern, grid: Grid, query: Grid, size: int) -> Image:
    """What one query sees, frame by frame."""
    from PIL import Image, ImageDraw

    seen = seen_keys(pattern, grid, query)
    frames, height, width = grid
    cell, columns = _places(grid, size)
    rows = ceil(frames / columns)
    step_x, step_y = max(cell * width, 34) + 10, cell * height + 24
    image = _canvas(max(columns * step_x, 280), 20 + rows * step_y)
    draw = ImageDraw.Draw(image)
    _write(image, (0, 2), f"the query sees {int(seen.sum())} of {seen.numel()} keys", 13)
    for frame in range(frames):
        x, y = 1 + frame % columns * step_x, 40 + frame // columns * step_y
        colours = _blend(seen[frame].float())
        colours = colours.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        image.paste(Image.fromarray(colours.numpy()), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell * width, y + cell * height), outline=LINE)
        if cell >= 8:
            for column in range(1, width):
                draw.line((x + cell * column, y, x + cell * column, y + cell * height - 1), PAPER)
            for row in range(1, height):
                draw.line((x, y + cell * row, x + cell * width - 1, y + cell * row), PAPER)
        if frame == query[0]:
            left, top, wide = x + cell * query[2], y + cell * query[1], max(0, 5 - cell) // 2
            draw.rectangle((left - wide, top - wide, left + cell - 1 + wide, top + cell - 1 + wide), fill=QUERY)
        _write(image, (x, y - 17), f"t = {frame}", 11)
    return image


def _places(grid: Grid, size: int) -> tuple[int, int]:
    """Pixels of a token, and frames beside each other: as large as fits beside the mask, then as square as can be."""

    def worth(columns: int) -> tuple[int, int]:
        rows = ceil(grid[0] / columns)
        cell = min((size - 10 * columns) // (columns * grid[2]), (size - 24 * rows) // (rows * grid[1]))
        cell = max(1, min(24, cell))
        return cell, -max(columns * (cell * grid[2] + 10), rows * (cell * grid[1] + 24))

    columns = max(range(1, grid[0] + 1), key=worth)
    return worth(columns)[0], columns


def _blend(shares: Tensor) -> Tensor:
    """Colour of shares, uint8 [..., 3]: any kept pair can be told from none."""
    weight = torch.where(shares > 0, _FAINT + (1 - _FAINT) * shares, shares)[..., None]
    low, high = torch.tensor(HIDDEN), torch.tensor(KEPT)
    return (low + (high - low) * weight).round().to(torch.uint8)


def _legend(image: Image, at: tuple[int, int], entries: Sequence[tuple[Colour, str]]) -> None:
    from PIL import ImageDraw

    draw, (x, y) = ImageDraw.Draw(image), at
    for colour, text in entries:
        draw.rectangle((x, y - 4, x + 12, y + 8), fill=colour, outline=LINE)
        x = _write(image, (x + 18, y - 6), text, 13) + 20


def _canvas(width: int, height: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height), PAPER)


def _write(image: Image, at: tuple[int, int], text: str, size: int) -> int:
    """Write text; returns where it ends."""
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.text(at, text, INK, font)
    return at[0] + ceil(draw.textlength(text, font))
