"""What differs between two plans, in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from visparse.plan import COMPENSATIONS, SparsePlan
from visparse.plan_view import HeadTable, head_tables, step_marks, steps_text
from visparse.plan_view_text import grid_text, layers_text, model_text
from visparse.rules import ModelFingerprint
from visparse.schedule import DenseSteps

Cell = tuple[int, int]

_WORDS: dict[str, Callable[[Any], str]] = {
    "name": repr,
    "model": model_text,
    "grids": lambda grids: "any" if grids is None else ", ".join(map(grid_text, grids)),
    "made_for": lambda grid: "none" if grid is None else grid_text(grid),
    "dense_steps": lambda value: str(DenseSteps.from_value(value)),
    "dense_layers": layers_text,
    **dict.fromkeys(COMPENSATIONS, str),
    "notes": repr,
}


def plan_changes(one: SparsePlan, other: SparsePlan, shape: ModelFingerprint | None = None) -> list[str]:
    """Say what differs between two plans.

    Args:
        one, other: the plans.
        shape: layers and heads for which the patterns of all heads are compared; None: those of the plans' models,
            where they agree. Without either, the rules are compared as they are written.

    Returns:
        A line for each difference; empty exactly where the two have the same JSON form.

    Raises:
        ValueError: a plan does not fit the shape.
    """
    return [*_header(one, other), *_patterns(one, other), *_assignment(one, other, shape), *_measured(one, other)]


def common_shape(one: SparsePlan, other: SparsePlan) -> ModelFingerprint | None:
    """The model that both plans are for, as far as layers and heads go; one that is for any model goes with the other.

    Returns:
        The shape; None where they differ, or both plans are for any model.
    """
    shapes = [plan.model for plan in (one, other) if plan.model is not None]
    same = len({(shape.layers, shape.heads) for shape in shapes}) == 1
    return shapes[0] if same else None


def heads_text(cells: Sequence[Cell]) -> str:
    """Heads by layer, such as `layers 2-4: heads 0, 3-5; layer 7: head 1`.

    Args:
        cells: (layer, head) each, ascending.
    """
    same: dict[str, list[int]] = {}
    for layer, group in groupby(cells, key=lambda cell: cell[0]):
        same.setdefault(_counted("head", [head for _, head in group]), []).append(layer)
    return "; ".join(f"{_counted('layer', layers)}: {heads}" for heads, layers in same.items())


def _header(one: SparsePlan, other: SparsePlan) -> Iterator[str]:
    mine, its = one.to_dict(), other.to_dict()
    for key, words in _WORDS.items():
        if mine[key] != its[key]:
            before, after = words(getattr(one, key)), words(getattr(other, key))
            if before == after:
                before, after = json.dumps(mine[key]), f"{json.dumps(its[key])}, which means the same"
            yield f"{key.replace('_', ' ')}: {before} -> {after}"


def _patterns(one: SparsePlan, other: SparsePlan) -> Iterator[str]:
    for name, template in one.patterns.items():
        if name not in other.patterns:
            yield f"pattern removed: {name}: {template}"
        elif template.to_dict() != other.patterns[name].to_dict():
            yield f"pattern changed: {name}: {template} -> {other.patterns[name]}"
    yield from (
        f"pattern added: {name}: {template}" for name, template in other.patterns.items() if name not in one.patterns
    )


def _assignment(one: SparsePlan, other: SparsePlan, shape: ModelFingerprint | None) -> Iterator[str]:
    mine, its = one.to_dict(), other.to_dict()
    written = [mine[key] for key in ("default", "assignment")] != [its[key] for key in ("default", "assignment")]
    shape = shape or common_shape(one, other)
    if shape is not None:
        lines = list(_heads(one, other, shape))
        yield from lines
        if written and not lines:
            yield "default and rules: written differently, with the same pattern for every head at every step"
        return
    if one.default != other.default:
        yield f"default: {one.default} -> {other.default}"
    rules = [[json.dumps(rule) for rule in plan["assignment"]] for plan in (mine, its)]
    gone, new = ([rule for rule in rules[i] if rule not in rules[1 - i]] for i in (0, 1))
    yield from (f"rule removed: {rule}" for rule in gone)
    yield from (f"rule added: {rule}" for rule in new)
    if rules[0] != rules[1] and not gone and not new:
        yield "rules: in another order, or repeated"


def _heads(one: SparsePlan, other: SparsePlan, shape: ModelFingerprint) -> Iterator[str]:
    """One line for each change from one pattern to another, and steps at which it holds."""
    marks = step_marks(one) | step_marks(other)
    tables = list(zip(head_tables(one, shape, marks), head_tables(other, shape, marks), strict=True))
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in ((layer, head) for layer in range(shape.layers) for head in range(shape.heads)):
        at: dict[tuple[str, str], list[HeadTable]] = {}
        for before, after in tables:
            a, b = before.cells[cell[0]][cell[1]], after.cells[cell[0]][cell[1]]
            if _entry(one, a) != _entry(other, b):
                to = f"{b}, which has changed" if a == b else b or "dense"
                at.setdefault((a or "dense", to), []).append(before)
        for (start, to), stretches in at.items():
            found.setdefault((start, to, _steps(stretches)), []).append(cell)
    for (start, to, steps), cells in found.items():
        yield f"{len(cells)} of {shape.layers * shape.heads} heads, {steps}: {start} -> {to}: {heads_text(cells)}"


def _steps(tables: Sequence[HeadTable]) -> str:
    """Stretches of steps in words, those that follow each other as one."""
    spans: list[tuple[int, int | None]] = []
    for table in tables:
        if spans and spans[-1][1] == table.first:
            spans[-1] = spans[-1][0], table.stop
        else:
            spans.append((table.first, table.stop))
    return ", ".join(steps_text(*span) for span in spans)


def _entry(plan: SparsePlan, name: str | None) -> dict[str, Any] | None:
    return None if name is None else plan.patterns[name].to_dict()


def _measured(one: SparsePlan, other: SparsePlan) -> Iterator[str]:
    mine, its = one.to_dict()["measured"], other.to_dict()["measured"]
    absent = object()
    keys = [key for key in {**mine, **its} if mine.get(key, absent) != its.get(key, absent)]
    if keys:
        yield f"measured: differs in {', '.join(keys)}"


def _counted(what: str, numbers: Sequence[int]) -> str:
    """Ascending numbers in words, such as `heads 0, 3-5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{what}{'' if len(numbers) == 1 else 's'} {text}"
