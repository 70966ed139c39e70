"""`visparse bench kernels`: attention of real shapes and patterns, beside every peer that is installed."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from visparse.bench.cases import Case
from visparse.bench.contenders.base import Contender
from visparse.bench.contenders.registry import PEERS
from visparse.bench.contenders.sdpa import cudnn_version
from visparse.bench.group import NO_TIME, Call, DeviceLost, Effort, Row, error_text, measure_group
from visparse.bench.patterns import describe, obstacle
from visparse.bench.problem import Inputs, Problem
from visparse.bench.timing import Deadline, Stopwatch
from visparse.measure.results import Record

_DENSE_FLOPS = {"cuda": 3e14, "cpu": 1e11}  # what slow dense attention does in a second, to judge what fits
_RUNS = {True: 25, False: 12}  # dense calls that a pattern costs: the dense one, any other


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What to measure.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: name of the dtype of q, k and v.
        cases: the shapes, in order.
        patterns: names; None: those of each case.
        unasked: peers that compile anew for each problem run only where the case has them; False: everywhere.
        blocks: (block_q, block_k) for visparse; None: what runs fastest for each implementation.
        repeats: most rounds.
        seconds: bound on the whole command.
        group_seconds: time for the rounds of one pattern.
        seed: of inputs, sampled rows and orders.
    """

    device: str
    dtype: str
    cases: tuple[Case, ...]
    patterns: tuple[str, ...] | None = None
    unasked: bool = True
    blocks: tuple[int, int] | None = None
    repeats: int = 20
    seconds: float = 480.0
    group_seconds: float = 2.0
    seed: int = 0


Listener = Callable[[Sequence[Row], Record], None]


def bench_kernels(settings: KernelSettings, contenders: Sequence[Contender], listen: Listener) -> Record:
    """Run the matrix until it is done or the time is over.

    Args:
        settings: what to measure.
        contenders: who takes part; dense ones are the baselines of every pattern.
        listen: called with the rows of each group and the record so far, so that nothing is lost.

    Returns:
        The record: absent contenders, then all groups.
    """
    effort = Effort(
        watch=Stopwatch(settings.device),
        deadline=Deadline(settings.seconds),
        repeats=settings.repeats,
        group_seconds=settings.group_seconds,
        seed=settings.seed,
    )
    missing = {one.name: one.absent() for one in contenders}
    absent: list[Row] = [{"contender": name, "absent": why} for name, why in missing.items() if why is not None]
    there = [one for one in contenders if missing[one.name] is None]
    empty = Record.collect("kernels", _settings(settings, contenders), [{}], device=settings.device)
    rows = list(absent)
    lost: str | None = None
    for case in settings.cases:
        one_case = _CaseBench(case, settings, there, effort)
        for name in one_case.patterns:
            try:
                group = one_case.run(name) if lost is None else one_case.left_out(name, lost)
            except DeviceLost as error:
                lost = str(error)
                group = one_case.left_out(name, lost)
            rows.extend(group)
            listen(group, replace(empty, rows=tuple(rows)))
        del one_case
        gc.collect()
        if settings.device == "cuda" and lost is None:
            torch.cuda.empty_cache()
    return replace(empty, rows=tuple(rows))


class _CaseBench:
    """The patterns of one case; dense always comes first, because it is what the others are compared with."""

    def __init__(self, case: Case, settings: KernelSettings, contenders: Sequence[Contender], effort: Effort) -> None:
        self.patterns = ("dense", *(name for name in settings.patterns or case.patterns if name != "dense"))
        self._case = case
        self._settings = settings
        self._contenders = contenders
        self._effort = effort
        self._baselines: dict[str, Call] = {}

    @cached_property
    def _inputs(self) -> Inputs:
        settings = self._settings
        return Inputs.random(self._case, settings.device, getattr(torch, settings.dtype), settings.seed)

    def left_out(self, name: str, reason: str) -> list[Row]:
        """The row of a pattern that is not run."""
        return [{"case": self._case.name, "pattern": name, "not_run": reason}]

    @torch.no_grad()
    def run(self, name: str) -> list[Row]:
        """The rows of one pattern."""
        case, settings = self._case, self._settings
        expected = case.dense_flops / _DENSE_FLOPS[settings.device] * _RUNS[name == "dense"]
        reason = obstacle(name, case) or (NO_TIME if self._effort.deadline.remaining < expected else None)
        if reason is not None:
            return self.left_out(name, reason)
        some = [one for one in self._contenders if _takes_part(one, case, name, settings)]
        try:
            problem = Problem(self._inputs, name, settings.blocks)
            rows, right = measure_group(problem, some, self._baselines, self._effort)
        except DeviceLost:
            raise
        except Exception as error:  # lists that cannot be built, or memory: the other patterns still run
            return [{"case": case.name, "pattern": name, "error": error_text(error)}]
        if name == "dense":
            self._baselines = _baselines(rows, right)
        return [{**row, "what": describe(name, case, problem.grain)} for row in rows]


def _takes_part(one: Contender, case: Case, pattern: str, settings: KernelSettings) -> bool:
    if one.dense or one.only is not None:
        return pattern in (one.only or ("dense",))
    return pattern in case.compiled or not (one.compiles_each and settings.unasked)


def _baselines(rows: Sequence[Row], right: dict[str, Call]) -> dict[str, Call]:
    """cuDNN, and the fastest dense contender."""
    timed = [row for row in rows if row.get("contender") in right and "milliseconds" in row]
    fastest = min(timed, key=lambda row: row["milliseconds"], default=None)
    names = {"sdpa_cudnn"} | ({fastest["contender"]} if fastest else set())
    return {name: call for name, call in right.items() if name in names}


def _settings(settings: KernelSettings, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        **asdict(settings),
        "cases": [case.name for case in settings.cases],
        "contenders": [one.name for one in contenders],
        "peers": {name: _version(name) for name in PEERS},
        "cudnn": cudnn_version() if settings.device == "cuda" else None,
        "check": "error rule against fp64 on 64 rows of every head of every contender, in the same run",
        "clock": "CUDA events, L2 cache overwritten before; rounds in an order drawn anew, dense among them; medians",
        "inside": "putting tokens into blocks and back; outside: lists, plans, heads-first copies for peers",
        "fields": {
            "tflops": "4 * tokens^2 * head_dim * heads * batch * density / time: kept pairs only",
            "tflops_visited": "the same with block_density: masked pairs of visited blocks too",
            "ratio_to_*": "its dense time / this time, of the same rounds",
            "rate_to_*": "useful rate / its dense rate, of the same rounds",
            "ideal": "1 / block_density: the best ratio if no visited block cost more than in dense attention",
            "compile_seconds": "building the lists, once",
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
