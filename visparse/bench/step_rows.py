"""Rows of `visparse bench step`: what follows from the times of a model's contenders, and the table for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from visparse.bench.step_contenders import DEFAULT, JUDGE

Row = dict[str, Any]


def complete(rows: Sequence[Row]) -> None:
    """Add ratios, shares and ceilings, each within one model and one mode (eager or compiled).

    `ratio_to_cudnn`, `ratio_to_default` and `ratio_to_fastest_dense` are how many times faster a row is. A dense row
    gets `attention_share`, the part of its time that goes away with self-attention. Other rows get `ceiling`,
    `ceiling_to_cudnn` and `ceiling_to_default`: the ratio if attention cost its block density times what it costs in
    that dense row (Amdahl's law).

    `added` is the time of a step over that of a step with the same selection and nothing that stands in for the rest.
    With proxies a window is widened to whole tiles, so there `added` holds that too.

    Args:
        rows: as `visparse.bench.step.measure` returns them; changed in place.
    """
    for _, group in groupby(sorted(rows, key=_place), key=_place):
        _complete_group([row for row in group if row.get("seconds")])


def _place(row: Row) -> tuple[str, str]:
    return row["model"], row["mode"]


def _complete_group(timed: list[Row]) -> None:
    seconds = {row["plan"]: row["seconds"] for row in timed}
    dense = {row["plan"]: row["seconds"] for row in timed if row["kind"] == "dense"}
    removed = next((row["seconds"] for row in timed if row["kind"] == "removed"), None)
    judges = {"cudnn": seconds.get(JUDGE), "default": seconds.get(DEFAULT)}
    fastest = min(dense.values(), default=None)
    for row in timed:
        row |= {f"ratio_to_{name}": _ratio(judge, row["seconds"]) for name, judge in judges.items()}
        row["ratio_to_fastest_dense"] = _ratio(fastest, row["seconds"])
        if row.get("without") in seconds:
            row["added"] = row["seconds"] / seconds[row["without"]]
        if removed is None:
            continue
        if row["kind"] == "dense":
            row["attention_share"] = 1 - removed / row["seconds"]
            continue
        density = 0.0 if row["kind"] == "removed" else row["block_density"]
        row |= {f"ceiling_to_{name}": _ceiling(judge, removed, density) for name, judge in judges.items()}
        row["ceiling"] = _ceiling(fastest, removed, density)


def _ratio(judge: float | None, seconds: float) -> float | None:
    return None if judge is None else judge / seconds


def _ceiling(judge: float | None, removed: float, density: float) -> float | None:
    return None if judge is None else judge / (removed + (judge - removed) * density)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a block of lines for each model.

    Args:
        rows: completed by `complete`.
    """
    lines: list[str] = []
    for name, group in groupby(rows, key=lambda row: row["model"]):
        own = list(group)
        first = own[0]
        depth = ", ".join(f"{count} {path}" for path, count in first["layers"].items())
        grid = "x".join(map(str, first["grid"]))
        lines += [
            "",
            f"{name}: grid {grid}, {first['tokens']} tokens, {first['heads']} heads of {first['head_dim']}, {depth}",
            f"  {'':<50}{'blocks':>8}{'seconds':>9}{'cuDNN':>15}{'default':>15}{'error':>9}  attend",
        ]
        lines += [f"  {_line(row)}" for row in own]
        lines += [f"  {_name(row)}: {text}" for row in own if (text := _reuse(row))]
        lines += [
            f"  {row['plan']} once more at the end: {again:.3f} s" for row in own if (again := row.get("seconds_again"))
        ]
    return "\n".join(lines[1:])


def _name(row: Row) -> str:
    name: str = row["plan"]
    return name + (", compiled" if row["mode"] == "compiled" else "")


def _reuse(row: Row) -> str:
    """What a row says of steps that measure, in words; empty where nothing."""
    parts = [f"{row['added']:.3f}x the step of {row['without']}"] if "added" in row else []
    if "measured_seconds" in row:
        parts.append(f"a step that measures takes {row['measured_seconds']:.3f} s")
        parts.append(f"{row['state_bytes'] / 2**20:.1f} MiB are kept for each branch")
    return ", ".join(parts)


def _line(row: Row) -> str:
    name = _name(row)
    if row.get("seconds") is None:
        return f"{name:<50}{row['why']}"
    blocks = f"{row['block_density']:.1%}" if row.get("block_density") is not None else "-"
    parts = "".join(f"{_of(row, judge):>15}" for judge in ("cudnn", "default"))
    error, impl = f"{row['relative_error']:.1e}", row.get("impl") or "-"
    return f"{name:<50}{blocks:>8}{row['seconds']:>9.3f}{parts}{error:>9}  {impl}"


def _of(row: Row, judge: str) -> str:
    """A ratio and its ceiling."""
    ratio, ceiling = row.get(f"ratio_to_{judge}"), row.get(f"ceiling_to_{judge}")
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if ceiling is None else f"{ratio:.2f}x of {ceiling:.2f}x"
