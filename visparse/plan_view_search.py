"""What a search tried, as text: schedules with their errors, and what each layer weighs in the output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def search_tables(measured: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tables of a plan's `measured` that a search wrote.

    Args:
        measured: free JSON; entries of another form are left to whoever prints the rest.

    Returns:
        Key of `measured` -> lines.
    """
    found = {"schedules": _schedules(measured.get("schedules")), "weights": _weights(measured)}
    return {key: lines for key, lines in found.items() if lines}


def _schedules(rows: Any) -> list[str]:
    """Schedules that were tried, the best one first."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        return []
    cells = [("dense steps", "refresh", "attention", "error of the output")]
    for row in sorted(rows, key=lambda row: _finite(row.get("output_error"), math.inf)):
        share, error = row.get("attention"), row.get("output_error")
        cells.append(
            (
                str(row.get("dense_steps", "-")),
                "never" if row.get("refresh") is None else str(row["refresh"]),
                f"{share:.1%}" if _is_number(share) else "-",
                f"{error:.4g}" if _is_number(error) else str(row.get("why_not", "not judged")),
            )
        )
    return ["schedules that were tried, all at the goal's speed-up", *_columns(cells)] if rows else []


def _weights(measured: Mapping[str, Any]) -> list[str]:
    """Weights of layers, the largest one of all 1."""
    weights, layers = measured.get("weights"), measured.get("layers")
    if not isinstance(weights, (list, tuple)) or not weights or not isinstance(layers, (Mapping, list, tuple)):
        return []
    for row in weights:
        if not isinstance(row, (list, tuple)) or len(row) != len(layers) or not all(map(_is_number, row)):
            return []
    most = max((max(row, default=0.0) for row in weights), default=0.0)
    if most <= 0:
        return []
    names = list(layers) if isinstance(layers, Mapping) else range(len(layers))
    heads = [f"range {number + 1}" for number in range(len(weights))] if len(weights) > 1 else ["weight"]
    cells = [("layer", *heads)]
    cells += [
        (str(name), *(f"{value / most:.3g}" for value in values))
        for name, values in zip(names, zip(*weights, strict=True), strict=True)
    ]
    return ["what an error of a layer weighs in the output, the most 1", *_columns(cells)]


def _columns(cells: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  " + "  ".join([*(f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in cells
    ]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _finite(value: Any, other: float) -> float:
    return float(value) if _is_number(value) else other
