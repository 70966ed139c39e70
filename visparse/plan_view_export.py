"""A plan with everything resolved for one grid: as a plan, and as rows for other programs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

from visparse.plan import SparsePlan
from visparse.plan_view import head_tables
from visparse.plan_view_check import block_densities, names_used
from visparse.plan_view_text import grid_text
from visparse.rules import ModelFingerprint
from visparse.templates import PatternTemplate

COLUMNS = ("layer", "head", "steps", "pattern", "parameters", "block_density", "block_density_most")


def resolved_plan(plan: SparsePlan, grid: tuple[int, int, int]) -> SparsePlan:
    """The plan with all lengths in tokens of one grid.

    Args:
        plan: the plan.
        grid: (frames, height, width), in tokens.

    Returns:
        A plan that does the same on that grid: `made_for` is the grid, shares and lengths made for other grids are
        lengths in tokens.

    Raises:
        ValueError: a pattern does not fit the grid, or the plan leaves that grid dense.
    """
    if plan.grids is not None and grid not in plan.grids:
        known = ", ".join(map(grid_text, plan.grids))
        raise ValueError(f"grid: wanted one of the plan's grids ({known}), got {grid_text(grid)}, where all runs dense")
    patterns = {}
    for name, template in plan.patterns.items():
        try:
            patterns[name] = _resolved(template, grid)
        except ValueError as error:
            raise ValueError(f"pattern {name!r} on grid {grid_text(grid)}: {error}") from error
    notes = "; ".join(filter(None, [plan.notes, f"resolved for grid {grid_text(grid)}"]))
    return replace(plan, patterns=patterns, made_for=grid, notes=notes)


def assignment_rows(plan: SparsePlan, shape: ModelFingerprint, grid: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Who has which pattern, one row for each head and stretch of steps.

    Args:
        plan: the plan, resolved or not.
        shape: layers and heads.
        grid: (frames, height, width), in tokens.

    Returns:
        Rows with the keys `COLUMNS`: `steps` as rules write them; which of them the schedule makes dense depends on the
        run. `parameters` is a mapping, `block_density` visited blocks / all blocks with the CPU's blocks (at least and
        at most, which differ only for selectors that decide by what they see).

    Raises:
        ValueError: the plan does not fit the shape or the grid.
    """
    plan = resolved_plan(plan, grid)
    densities = block_densities(plan, names_used(plan, shape), grid, shape.head_dim)
    entries = {name: plan.patterns[name].to_dict() for name in densities}
    rows = []
    for table in head_tables(plan, shape):
        for layer, cells in enumerate(table.cells):
            for head, name in enumerate(cells):
                entry = {"name": "dense"} if name is None else entries[name]
                least, most = (1.0, 1.0) if name is None else densities[name]
                values = {key: value for key, value in entry.items() if key != "name"}
                row = (layer, head, table.steps, entry["name"], values, round(least, 6), round(most, 6))
                rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def rows_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of `assignment_rows` as CSV with a header; parameters are JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "parameters": json.dumps(row["parameters"])} for row in rows)
    return out.getvalue()


def _resolved(template: PatternTemplate, grid: tuple[int, int, int]) -> PatternTemplate:
    if not template.per_head:
        return PatternTemplate(template.resolve(grid).to_dict(), grid)
    parts = [template.part(place).resolve(grid).to_dict() for place in range(len(template.entry["patterns"]))]
    return PatternTemplate({**template.to_dict(), "patterns": parts}, grid)
