"""The kernel benchmark as text: a table for each pattern, and what did not run at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_COLUMNS = ("contender", "ms", "min to max", "TFLOP/s", "visited", "x cuDNN", "x fastest", "rate/cuDNN")
_RULE = (
    "TFLOP/s: kept pairs only; visited: whole visited blocks; x: times faster than dense; "
    "rate/cuDNN: useful rate over cuDNN's dense rate"
)


def group_text(rows: Sequence[Row]) -> str:
    """One case and pattern.

    Args:
        rows: as `measure_group` gives them.
    """
    first = rows[0]
    shown = [row for row in rows if "milliseconds" in row]
    if not shown and "contender" not in first:
        return f"{first['case']} {first['pattern']}: {_why(first)}"
    batch = f"{first['batch']} x " if first["batch"] > 1 else ""
    lines = [
        f"{first['case']} {first['pattern']}: {first['what']}",
        f"  {batch}{first['tokens']} tokens, {first['heads']} heads of {first['head_dim']}, {first['dtype']}"
        + _lists(shown),
    ]
    cells = [_COLUMNS, *(_cells(row) for row in shown)] if shown else []
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))] if cells else []
    for line in cells:
        joined = "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append(f"  {joined}".rstrip())
    lines += [f"  {row['contender']}: {_why(row)}" for row in rows if "error" in row or "not_run" in row]
    return "\n".join(lines)


def foot_text(rows: Sequence[Row]) -> str:
    """What the figures mean, who is absent, who cannot run what, and what was not run."""
    lines = [_RULE]
    lines += [f"absent: {row['contender']}: {row['absent']}" for row in rows if "absent" in row]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "cannot_run" in row:
            reasons.setdefault((row["contender"], row["cannot_run"]), []).append(f"{row['case']} {row['pattern']}")
    lines += [f"cannot run: {name}: {why} ({len(where)}: {where[0]}...)" for (name, why), where in reasons.items()]
    over = [
        f"{row['case']} {row['pattern']}" for row in rows if row.get("not_run") == "time" and "contender" not in row
    ]
    if over:
        lines.append(f"not run: time: {', '.join(over)}")
    return "\n".join(lines)


def _lists(shown: Sequence[Row]) -> str:
    for row in shown:
        if "list_bytes" in row:
            return (
                f"; density {row['density']:.2%}, blocks {row['block_density']:.2%} (ideal {row['ideal']:.2f}x); "
                f"lists {row['compile_seconds']:.2f} s, {row['list_bytes'] / 2**20:.1f} MiB"
            )
    return ""


def _cells(row: Row) -> tuple[str, ...]:
    name = row["contender"] + (" (dense)" if row.get("baseline") else "")
    if "variant" in row:
        name += f" [{row['variant']}]"
    return (
        name,
        f"{row['milliseconds']:.3f}",
        f"{row['milliseconds_min']:.3f} to {row['milliseconds_max']:.3f}",
        f"{row['tflops']:.3g}",
        f"{row['tflops_visited']:.3g}",
        *(
            "-" if row[key] is None else f"{row[key]:.2f}"
            for key in ("ratio_to_cudnn", "ratio_to_fastest_dense", "rate_to_cudnn")
        ),
    )


def _why(row: Row) -> str:
    if "error" in row:
        return f"wrong, so no speed: {row['error']}"
    return f"not run: {row['not_run']}"
