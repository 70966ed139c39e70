"""`visparse bench compile`: seconds and memory of compiling patterns to block lists, with a cold cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from visparse.bench.cases import Case, find_case
from visparse.bench.group import NO_TIME, Row, error_text
from visparse.bench.patterns import build_lists, check_pattern, describe, obstacle
from visparse.bench.problem import Built
from visparse.bench.timing import Deadline
from visparse.measure.results import Record
from visparse_kernels import BlockLists, preferred_blocks, prefers_boxes

_CASES = ("wan14b_720p", "hunyuan_720p")
_PATTERNS = ("radial", "radial_code", "gna", "gna_strided", "sta")
_STATUS, _RESET = "/proc/self/status", "/proc/self/clear_refs"


def bench_compile(
    device: str,
    *,
    cases: Sequence[str] = (),
    patterns: Sequence[str] = (),
    blocks: tuple[int, int] | None = None,
    repeats: int = 3,
    seconds: float = 480.0,
) -> Record:
    """Compile every pattern for every case, each time from nothing.

    Args:
        device: where the lists are built.
        cases: names; none: Wan 2.1 at 720p (75,600 tokens) and HunyuanVideo at 720p without its text (118,800).
        patterns: names; none: radial in both variants, neighbourhoods with and without stride, sliding tiles.
        blocks: (block_q, block_k); None: `preferred_blocks`.
        repeats: cold runs of each.
        seconds: bound on all.

    Raises:
        ValueError: an unknown name.
    """
    chosen = [find_case(name) for name in cases] or [replace(find_case(name), after=0) for name in _CASES]
    names = [check_pattern(name) for name in patterns] or list(_PATTERNS)
    deadline = Deadline(seconds)
    rows = []
    for case in chosen:
        for name in names:
            for form in _forms(case, blocks, device):
                rows.append({**_row(case, name, form, device, repeats, deadline), "boxes": form.boxes})
    settings = {
        "measured": "compiling block lists; the cache is emptied before each run",
        "repeats": repeats,
        "memory": "highest above what was there before: of the CUDA allocator, or of the process",
    }
    return Record.collect("kernels", settings, rows, device=device)


class _Form(NamedTuple):
    block_q: int
    block_k: int
    boxes: bool


def _forms(case: Case, blocks: tuple[int, int] | None, device: str) -> list[_Form]:
    """Order tables; and boxes too, where they run faster on this device."""
    best = blocks or preferred_blocks(device, case.head_dim)
    return [_Form(*best, False), *([_Form(*best, True)] if prefers_boxes(device, case.head_dim) else [])]


def table_text(record: Record) -> str:
    """The record as a table."""
    lines = [f"compiling block lists on {record.device['name']}", ""]
    for row in record.rows:
        head = f"{row['case']:14} {row['pattern']:12} {'boxes' if row['boxes'] else 'tables':6}"
        if "seconds" not in row:
            lines.append(f"{head} {row.get('error') or 'not run: ' + row['not_run']}")
            continue
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"{head} {row['tokens']:7} tokens  {row['seconds']:8.3f} s ({row['seconds_min']:.3f} to "
            f"{row['seconds_max']:.3f})  peak {memory:>9}  lists {row['list_bytes'] / 2**20:7.1f} MiB  "
            f"blocks {row['block_density']:.2%}  {row['what']}"
        )
    return "\n".join(lines)


def _row(case: Case, name: str, form: _Form, device: str, repeats: int, deadline: Deadline) -> Row:
    row: Row = {"case": case.name, "pattern": name, "grid": list(case.grid), "tokens": case.tokens}
    row |= {"heads": case.heads, "block_q": form.block_q, "block_k": form.block_k}
    reason = obstacle(name, case)
    if reason is not None or deadline.remaining <= 0:
        return {**row, "not_run": reason or NO_TIME}

    def build() -> BlockLists:
        return build_lists(name, case, **form._asdict(), grain=(form.block_q, form.block_k), device=device)

    taken: list[float] = []
    peaks: list[int | None] = []
    try:
        while len(taken) < repeats and (not taken or deadline.remaining > taken[-1]):
            lists, seconds, peak = _measured(build, device)
            taken.append(seconds)
            peaks.append(peak)
    except (ValueError, RuntimeError) as error:
        return {**row, "error": error_text(error)}
    built = Built(lists=lists, seconds=statistics.median(taken))
    return {
        **row,
        "what": describe(name, case, (form.block_q, form.block_k)),
        "seconds": built.seconds,
        "seconds_first": taken[0],
        "seconds_min": min(taken),
        "seconds_max": max(taken),
        "repeats": len(taken),
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "list_bytes": built.bytes,
        "density": lists.density,
        "block_density": built.block_density,
    }


def _measured(build: Callable[[], BlockLists], device: str) -> tuple[BlockLists, float, int | None]:
    """Lists, seconds, and the highest memory above what was there before, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    begin = time.perf_counter()
    lists = build()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    after: Any = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    return lists, seconds, None if before is None or after is None else max(0, after - before)


def _reset_peak() -> int | None:
    """Forget the highest memory of this process; return its present one, or None where the system cannot."""
    try:
        with open(_RESET, "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    """A field of the process's status, in bytes."""
    try:
        with open(_STATUS, encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None
