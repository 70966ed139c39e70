"""One case with one pattern: check every contender, time those that are right, one row each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visparse.bench.check import Sample, sample_rows
from visparse.bench.contenders.base import Contender
from visparse.bench.problem import Built, Problem
from visparse.bench.timing import Deadline, Stopwatch, clock_mhz, time_rounds

Row = dict[str, Any]
Call = Callable[[], Tensor]
_LEAST = 3
_TEXT = 400
NO_TIME = "time"


class DeviceLost(RuntimeError):
    """A contender broke the CUDA context: nothing can run after it."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to measure.

    Args:
        watch: the clock.
        deadline: of the whole command.
        repeats: most rounds of a group.
        group_seconds: time that the rounds of a group may take, unless three rounds take longer.
        seed: of the sampled rows and of the orders.
    """

    watch: Stopwatch
    deadline: Deadline
    repeats: int
    group_seconds: float
    seed: int


def measure_group(
    problem: Problem, contenders: Sequence[Contender], baselines: Mapping[str, Call], effort: Effort
) -> tuple[list[Row], dict[str, Call]]:
    """Check and time contenders on one problem, interleaved with dense attention of the same case.

    Args:
        problem: what is computed.
        contenders: who takes part.
        baselines: name -> call of dense contenders that were right; they are timed again in these rounds.
        effort: how hard to measure.

    Returns:
        The rows, and the calls of the dense contenders that were right.

    Raises:
        DeviceLost: a contender broke the CUDA context.
    """
    sample = sample_rows(problem, seed=effort.seed)
    rows: list[Row] = []
    ready: dict[str, Call] = {}
    facts: dict[str, Row] = {}
    for contender in contenders:
        row = _identity(problem, contender)
        reason = _reason(contender, problem)
        if reason is not None:
            if not contender.dense:
                rows.append({**row, "cannot_run": reason})
            continue
        if effort.deadline.remaining < contender.setup_seconds:
            rows.append({**row, "not_run": NO_TIME})
            continue
        call, error = _try(contender, problem, sample)
        if call is None:
            rows.append({**row, "correct": False, "error": error})
            continue
        ready[contender.name] = call
        facts[contender.name] = {**row, **contender.facts(problem)}
    times, clocks = _time({**baselines, **ready}, effort)
    medians = {name: statistics.median(taken) for name, taken in times.items() if taken}
    dense_names = [one.name for one in contenders if one.dense and one.name in ready] or list(baselines)
    fastest = min((medians[name] for name in dense_names if name in medians), default=None)
    cudnn = medians.get("sdpa_cudnn")
    for name in baselines:
        if name in medians:
            identity = {**_case(problem), "contender": name, "baseline": True}
            rows.append({**identity, **_figures(problem, times[name], cudnn, fastest, None)})
    for contender in contenders:
        name = contender.name
        if name not in ready:
            continue
        if name not in medians:
            rows.append({**facts[name], "correct": True, "not_run": NO_TIME})
            continue
        built = None if contender.dense else contender.built(problem)
        figures = _figures(problem, times[name], cudnn, fastest, built)
        rows.append({**facts[name], **figures, "clock_mhz": clocks})
    return rows, {one.name: ready[one.name] for one in contenders if one.dense and one.name in ready}


def _reason(contender: Contender, problem: Problem) -> str | None:
    try:
        return contender.can_run(problem)
    except Exception as error:  # lists of its block size cannot be had, or its package is broken
        return error_text(error)


def _try(contender: Contender, problem: Problem, sample: Sample) -> tuple[Call | None, str | None]:
    """Prepare, run once and judge: the call, or what was wrong."""
    try:
        call = contender.prepare(problem)
        wrong = sample.verdict(contender.tokens(problem, call()))
    except Exception as error:  # a peer may raise anything; it becomes a row
        if problem.inputs.q.is_cuda:
            _check_device(contender.name, error)
        return None, error_text(error)
    return (call, None) if wrong is None else (None, wrong)


def _check_device(name: str, error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as lost:
        raise DeviceLost(f"{name} broke the CUDA context: {error_text(error)}") from lost


def _time(calls: Mapping[str, Call], effort: Effort) -> tuple[dict[str, list[float]], list[int | None]]:
    """One round to see how long it takes, then as many as fit."""
    before = clock_mhz(effort.watch.device)
    first = time_rounds(calls, effort.watch, rounds=1, deadline=effort.deadline, seed=effort.seed)
    seconds = sum(sum(taken) for taken in first.values()) / 1e3
    fitting = int(effort.group_seconds / seconds) if seconds else effort.repeats
    rounds = min(effort.repeats, max(_LEAST, fitting))
    times = time_rounds(calls, effort.watch, rounds=rounds, deadline=effort.deadline, seed=effort.seed + 1)
    return times, [before, clock_mhz(effort.watch.device)]


def _case(problem: Problem) -> Row:
    case = problem.case
    return {
        "case": case.name,
        "pattern": problem.pattern,
        "grid": list(case.grid),
        "batch": case.batch,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": str(problem.inputs.q.dtype).removeprefix("torch."),
    }


def _identity(problem: Problem, contender: Contender) -> Row:
    return {**_case(problem), "contender": contender.name}


def _figures(
    problem: Problem, taken: Sequence[float], cudnn: float | None, fastest: float | None, built: Built | None
) -> Row:
    """Times and what follows from them; without lists every pair was computed."""
    density, visited = (1.0, 1.0) if built is None else (problem.density, built.block_density)
    median = statistics.median(taken)
    rate = problem.case.dense_flops / median / 1e9
    row: Row = {
        "correct": True,
        "density": density,
        "block_density": visited,
        "milliseconds": median,
        "milliseconds_min": min(taken),
        "milliseconds_max": max(taken),
        "repeats": len(taken),
        "tflops": rate * density,
        "tflops_visited": rate * visited,
        "ratio_to_cudnn": cudnn / median if cudnn else None,
        "ratio_to_fastest_dense": fastest / median if fastest else None,
        "rate_to_cudnn": cudnn / median * density if cudnn else None,
        "rate_to_fastest_dense": fastest / median * density if fastest else None,
        "ideal": 1 / visited if visited else None,
    }
    if built is not None:
        row |= {"compile_seconds": built.seconds, "list_bytes": built.bytes}
    return row


def error_text(error: Exception) -> str:
    """An error as one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."
