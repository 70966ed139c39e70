"""The picture of a plan: layers by heads coloured by pattern, a legend, and error and time of each layer as bars."""

from __future__ import annotations

import colorsys
import textwrap
from math import ceil
from typing import TYPE_CHECKING, Any

from visparse.patterns.draw_pictures import HIDDEN, INK, LINE, PAPER, Colour
from visparse.plan_view import DENSE_ID, HeadTable, PlanView
from visparse.plan_view_text import grid_text, model_text

if TYPE_CHECKING:
    from PIL.Image import Image

_PALETTE: tuple[Colour, ...] = (
    (38, 98, 190),
    (238, 150, 46),
    (46, 150, 90),
    (214, 40, 57),
    (130, 84, 170),
    (90, 180, 200),
    (160, 110, 70),
    (226, 120, 180),
    (150, 170, 40),
    (20, 60, 90),
)
_DENSE: Colour = (90, 96, 106)
_GAP, _LINE_HEIGHT, _LABELS, _BAR = 24, 20, 34, 150
_MOST_BESIDE = 3  # tables in a row
_NARROWEST = 720
_SIDE = 400  # pixels of the longer side of a table, where cells of 6 to 22 pixels allow it


def plan_picture(view: PlanView) -> Image:
    """Draw a plan.

    Args:
        view: from `view_plan`, with a shape.

    Returns:
        An RGB image: one table for each stretch of steps with rules of its own, and bars beside them if the plan has
        figures for its layers.

    Raises:
        ValueError: the view has no shape.
    """
    if view.shape is None:
        raise ValueError(
            f"picture: wanted a number of layers and heads, and plan {view.plan.name!r} is for any model; "
            "give --layers and --heads"
        )
    from PIL import Image, ImageDraw

    cell = max(6, min(22, _SIDE // max(view.shape.layers, view.shape.heads)))
    panel = (_LABELS + cell * view.shape.heads + _GAP, cell * view.shape.layers + 2 * _LINE_HEIGHT + _GAP)
    beside = min(_MOST_BESIDE, len(view.tables))
    kinds = [key for key in ("error", "milliseconds") if any(getattr(cost, key) is not None for cost in view.costs)]
    width = max(_NARROWEST, 2 * _GAP + beside * panel[0] + len(kinds) * (_BAR + _GAP))
    title, legend = _title(view, width), _legend(view, width)
    top = _GAP // 2 + _LINE_HEIGHT * len(title) + _GAP // 2
    tables = ceil(len(view.tables) / beside) * panel[1]
    rows = sum(len(lines) for _, lines in legend)
    image = Image.new("RGB", (width, top + tables + rows * _LINE_HEIGHT + _GAP), PAPER)
    draw, colours = ImageDraw.Draw(image), _colours(view)
    for number, line in enumerate(title):
        _write(draw, (_GAP, _GAP // 2 + _LINE_HEIGHT * number), line, 13 if number else 15)
    for place, table in enumerate(view.tables):
        at = _GAP + place % beside * panel[0], top + place // beside * panel[1]
        _draw_table(draw, at, view, table, cell, colours)
    for place, kind in enumerate(kinds):
        at = _GAP + beside * panel[0] + place * (_BAR + _GAP), top
        _draw_bars(draw, at, view, kind, cell)
    y = top + tables
    for name, lines in legend:
        draw.rectangle((_GAP, y + 3, _GAP + 12, y + 15), fill=colours[name], outline=LINE)
        for line in lines:
            _write(draw, (_GAP + 20, y), line, 13)
            y += _LINE_HEIGHT
    return image


def _title(view: PlanView, width: int) -> list[str]:
    plan = view.plan
    grid = "" if plan.made_for is None else f"; lengths made for {grid_text(plan.made_for)}"
    lines = [f"plan {plan.name!r}", f"{model_text(view.shape)}{grid}"]
    return [part for line in lines for part in textwrap.wrap(line, (width - 2 * _GAP) // 8)]


def _legend(view: PlanView, width: int) -> list[tuple[str | None, list[str]]]:
    """Used patterns in the order of their ids; the dense one, whatever its names are, comes last."""
    seen = {name for table in view.tables for row in table.cells for name in row}
    entries: list[tuple[str | None, str]] = [
        (name, f"{identity}  {'' if name == identity else f'{name}: '}{view.pattern(name)}")
        for name, identity in view.ids.items()
        if name in seen
    ]
    if None in seen:
        entries.append((None, f"{DENSE_ID}  dense"))
    return [(name, textwrap.wrap(text, (width - 2 * _GAP - 20) // 7)) for name, text in entries]


def _colours(view: PlanView) -> dict[str | None, Colour]:
    found: dict[str | None, Colour] = {None: _DENSE}
    for name in view.ids:
        if view.pattern(name).is_dense or view.pattern(name).per_head:
            continue
        if view.pattern(name).entry["name"] == "skip":
            found[name] = HIDDEN
            continue
        count = sum(colour not in (_DENSE, HIDDEN) for colour in found.values())
        red, green, blue = colorsys.hsv_to_rgb(count * 0.618 % 1, 0.45, 0.85)
        more = round(255 * red), round(255 * green), round(255 * blue)
        found[name] = _PALETTE[count] if count < len(_PALETTE) else more
    return found


def _draw_table(
    draw: Any, at: tuple[int, int], view: PlanView, table: HeadTable, cell: int, colours: dict[str | None, Colour]
) -> None:
    x, y = at[0] + _LABELS, at[1] + 2 * _LINE_HEIGHT
    _write(draw, (at[0], at[1]), f"layers down, heads across, {table.words}", 13)
    every = max(1, ceil(18 / cell))
    every = every if every == 1 else 5 * ceil(every / 5)
    for head in range(0, len(table.cells[0]), every):
        _write(draw, (x + head * cell + 1, y - 16), str(head), 11)
    for layer, row in enumerate(table.cells):
        if layer % every == 0:
            _write(draw, (at[0] + 8, y + layer * cell + cell // 2 - 7), str(layer), 11)
        for head, name in enumerate(row):
            left, upper = x + head * cell, y + layer * cell
            draw.rectangle((left, upper, left + cell, upper + cell), fill=colours[name], outline=PAPER)
            if name is not None and cell >= 16:
                light = sum(colours[name]) > 450
                _write(draw, (left + 3, upper + cell // 2 - 8), view.id_of(name), 12, INK if light else PAPER)
    draw.rectangle((x - 1, y - 1, x + len(table.cells[0]) * cell + 1, y + len(table.cells) * cell + 1), outline=LINE)


def _draw_bars(draw: Any, at: tuple[int, int], view: PlanView, kind: str, cell: int) -> None:
    """One bar for each layer, as high as its row in the table; the longest is all of the width."""
    values = {cost.layer: getattr(cost, kind) for cost in view.costs if cost.layer < len(view.tables[0].cells)}
    most = max((value for value in values.values() if value is not None), default=0.0)
    _write(draw, at, "error" if kind == "error" else "ms a step", 13)
    _write(draw, (at[0], at[1] + _LINE_HEIGHT), f"0 to {most:.3g}", 11)
    y = at[1] + 2 * _LINE_HEIGHT
    colour = _PALETTE[3] if kind == "error" else _PALETTE[0]
    draw.line((at[0], y, at[0], y + len(view.tables[0].cells) * cell), LINE)
    for layer, value in values.items():
        if value is None:
            continue
        length = round(_BAR * value / most) if most else 0
        draw.rectangle((at[0], y + layer * cell + 1, at[0] + length, y + (layer + 1) * cell - 1), fill=colour)
        if cell >= 12:
            inside = length > _BAR // 2
            place = at[0] + 4 if inside else at[0] + length + 4
            _write(draw, (place, y + layer * cell + cell // 2 - 7), f"{value:.3g}", 11, PAPER if inside else INK)


def _write(draw: Any, at: tuple[int, int], text: str, size: int, colour: Colour = INK) -> None:
    from PIL import ImageFont

    draw.text(at, text, colour, ImageFont.load_default(size))
