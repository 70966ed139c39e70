"""A plan as text: header, patterns with ids, a table of layers by heads, what was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from visparse.plan import COMPENSATIONS, SCHEMA, SparsePlan
from visparse.plan_view import DENSE_ID, HeadTable, LayerCost, PlanView
from visparse.plan_view_search import search_tables
from visparse.rules import ModelFingerprint
from visparse.schedule import DenseSteps

_WIDTH = 120
_BAR = 24  # characters of the longest bar


def plan_text(view: PlanView) -> str:
    """The whole plan for a terminal.

    Args:
        view: from `view_plan`.

    Returns:
        Lines without a final line break.
    """
    parts = [header_lines(view.plan), _legend(view)]
    if view.shape is None:
        parts.append(["The plan is for any model; layers and heads (--layers, --heads) draw who has which pattern."])
    parts += [_table(view, table) for table in view.tables]
    tables = search_tables(view.plan.measured)
    apart = {*tables, *(["layers"] if view.costs else [])}
    rest = {key: value for key, value in view.plan.measured.items() if key not in apart}
    parts += [_measured(rest), *tables.values(), _costs(view.costs)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def header_lines(plan: SparsePlan) -> list[str]:
    """What a plan is for, and what holds for all its heads."""
    facts = {
        "model": model_text(plan.model),
        "grids": "any" if plan.grids is None else ", ".join(map(grid_text, plan.grids)) + "; all others run dense",
        "lengths": "in tokens stay the same on every grid"
        if plan.made_for is None
        else f"in tokens are for {grid_text(plan.made_for)}, and are rescaled to other grids",
        "default": plan.default,
        "dense steps": str(DenseSteps.from_value(plan.dense_steps)),
        "dense layers": layers_text(plan.dense_layers),
        **{key: str(getattr(plan, key)) for key in COMPENSATIONS if getattr(plan, key) is not None},
        **({"notes": plan.notes} if plan.notes else {}),
    }
    width = max(map(len, facts))
    lines = [f"plan {plan.name!r}, schema {SCHEMA}"]
    for key, text in facts.items():
        lines += _wrapped(f"  {key:<{width}}  ", text)
    return lines


def grid_text(grid: tuple[int, int, int]) -> str:
    """A grid such as 21x45x80."""
    return "x".join(map(str, grid))


def model_text(model: ModelFingerprint | None) -> str:
    """A model's shape in words."""
    if model is None:
        return "any"
    return f"{model.model_class}, {model.layers} layers of {model.heads} heads of {model.head_dim}"


def layers_text(layers: int | str | tuple[int, ...]) -> str:
    """A plan's dense layers in words."""
    if isinstance(layers, int):
        return f"first {layers}" if layers else "none"
    return layers if isinstance(layers, str) else ", ".join(map(str, layers))


def _legend(view: PlanView) -> list[str]:
    rows = [("id", "pattern", "heads at the end" if len(view.tables) > 1 else "heads", "what it keeps")]
    for name, identity in view.ids.items():
        heads = "" if view.shape is None or view.pattern(name).per_head else str(view.heads.get(name, 0))
        if identity == DENSE_ID and view.tables:
            heads = str(sum(row.count(None) for row in view.tables[-1].cells))
        rows.append((identity, name, heads, str(view.pattern(name))))
    if DENSE_ID not in view.ids.values() and any(None in row for table in view.tables for row in table.cells):
        count = sum(row.count(None) for row in view.tables[-1].cells)
        rows.append((DENSE_ID, "", str(count), "dense layers"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines: list[str] = []
    for identity, name, heads, what in rows:
        lines += _wrapped(f"  {identity:<{widths[0]}}  {name:<{widths[1]}}  {heads:>{widths[2]}}  ", what)
    return lines


def _table(view: PlanView, table: HeadTable) -> list[str]:
    cells = [[view.id_of(name) for name in row] for row in table.cells]
    width = max(len(cell) for row in cells for cell in row)
    count = len(cells[0])
    every = 1 if count <= 10 else 5
    marks = [str(head) if head % every == 0 else "" for head in range(count)]
    edge = max(len("layer"), len(str(len(cells) - 1))) + 2
    head = " " * edge
    for place, mark in enumerate(marks):
        end = edge + (place + 1) * (width + 1)
        if len(head) + len(mark) <= end:
            head = head.ljust(end - len(mark)) + mark
    title = f"layers down, heads across, {table.words} (what the schedule makes dense aside)"
    lines = [title, f"{'layer':<{edge}}".rstrip() + head[len("layer") :].rstrip()]
    for layer, row in enumerate(cells):
        lines.append(f"{layer:>{edge - 2}}  " + "".join(f" {cell:>{width}}" for cell in row))
    return lines


def _measured(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    width = max(map(len, facts))
    lines = ["measured"]
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines += _wrapped(f"  {key:<{width}}  ", text)
    return lines


def _costs(costs: tuple[LayerCost, ...]) -> list[str]:
    if not costs:
        return []
    most = {key: max((getattr(cost, key) or 0.0 for cost in costs), default=0.0) for key in ("error", "milliseconds")}
    lines = [f"{'layer':>7}  {'error':>8}  {'':<{_BAR}}  {'ms':>8}"]
    for cost in costs:
        error = f"{_number(cost.error):>8}  {_bar(cost.error, most['error']):<{_BAR}}"
        time = f"{_number(cost.milliseconds):>8}  {_bar(cost.milliseconds, most['milliseconds'])}"
        lines.append(f"{cost.layer:>7}  {error}  {time}".rstrip())
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bar(value: float | None, most: float) -> str:
    return "█" * round(_BAR * value / most) if value and most else ""


def _wrapped(start: str, text: str) -> Iterator[str]:
    """Lines that begin with `start`, the later ones with as many blanks."""
    lines = textwrap.wrap(text, max(40, _WIDTH - len(start))) or [""]
    yield (start + lines[0]).rstrip()
    yield from (" " * len(start) + line for line in lines[1:])
