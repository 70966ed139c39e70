"""Time of one denoiser forward of real architectures, with random weights and few layers, scaled to all layers."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from visparse.bench.models import Architecture
from visparse.bench.step_build import Depth, build, compiled_blocks, depth_of, make_inputs
from visparse.bench.step_contenders import JUDGE, Contender, contenders, installed
from visparse.bench.step_runs import MOST_STEPS, Calls, Forwards, calls_of, demand_calls, state_bytes
from visparse.bench.step_time import depths, scale_up, time_once
from visparse.handle import Handle

Row = dict[str, Any]

# Largest relative error of a whole forward against the model untouched. In bfloat16 each layer rounds anew.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
_BLIND = 10  # removed attention must change the output this many times more than the tolerance
_PATIENCE = 6.0  # seconds; timing at one depth stops there, after at least one run


class OutOfTime(Exception):
    """The time budget is spent."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the steps are measured.

    Args:
        device: where the denoiser runs.
        dtype: of its weights and inputs, but for what diffusers keeps in float32.
        layers: blocks of a kind in the deeper of the two measurements, at least 2.
        repeats: timed forwards at each depth; the median counts. At most 100.
        compiled: measure each contender with compiled blocks too.
        backend: of torch.compile.
        deadline: `time.perf_counter()` at which nothing new is begun.
        notify: told what was measured, a line at a time.
        seed: of weights and inputs.
        plans: parts of the names of contenders, see `visparse.bench.step_contenders.contenders`; empty: all.
    """

    device: torch.device
    dtype: torch.dtype
    layers: int = 3
    repeats: int = 3
    compiled: bool = False
    backend: str = "inductor"
    deadline: float = float("inf")
    notify: Callable[[str], None] = print
    seed: int = 0
    plans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.layers < 2:
            raise ValueError(f"layers: wanted at least 2, got {self.layers}; time per layer comes from two depths")
        if not 1 <= self.repeats <= MOST_STEPS:
            raise ValueError(f"repeats: wanted 1 to {MOST_STEPS}, got {self.repeats}; 3 is usual")


def measure(model: Architecture, options: Options) -> list[Row]:
    """One row for each contender, eager and (if wanted) compiled. What fails or no longer fits is a row that says so.

    Args:
        model: what to measure.
        options: how.

    Returns:
        The rows; see `visparse.bench.step_rows.complete` for ratios. None where no contender has one of `plans` in its
        name.
    """
    modes = ["eager", "compiled"] if options.compiled else ["eager"]
    todo = [(mode, one) for mode in modes for one in contenders(model, options.device, options.plans)]
    if not todo:
        return []
    rows = [_blank(model, contender, mode, options) for mode, contender in todo]
    try:
        bench = _Bench(model, options)
    except (OutOfTime, RuntimeError) as error:
        return [row | {"why": _why(error)} for row in rows]
    for row, (mode, contender) in zip(rows, todo, strict=True):
        row |= {"why": f"absent: {contender.absent}"} if contender.absent else bench.row(contender, mode)
        seconds = row.get("seconds")
        options.notify(f"{model.name} {mode} {contender.name}: {row['why'] if seconds is None else f'{seconds:.3f} s'}")
    first = next((i for i, row in enumerate(rows) if row["plan"] == JUDGE and "seconds" in row), None)
    if first is not None:
        rows[first]["seconds_again"] = bench.row(todo[first][1], todo[first][0]).get("seconds")
    del bench
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


class _Bench:
    """A built denoiser, its inputs, its output when untouched, and how far removed attention changes that."""

    def __init__(self, model: Architecture, options: Options) -> None:
        self.model, self.options = model, options
        self.points = depths(model, options.layers)
        self.check_at = self.points[1]
        _hurry(options)
        device, dtype, seed = options.device, options.dtype, options.seed
        self.denoiser = build(model, options.layers, device, dtype, seed)
        inputs = make_inputs(model, device, dtype, seed + 1)
        self.forwards = Forwards(model, self.denoiser, inputs, lambda: _hurry(options))
        self.sensitivity: dict[str, float] = {}
        self.exact: dict[str, bool] = {}
        with depth_of(self.denoiser, model, self.check_at):
            self.wanted = self.forwards.forward().float()
        self.later: Tensor | None = None  # as `wanted`, at the next step's timestep

    def row(self, contender: Contender, mode: str) -> Row:
        """What one contender gives: times, or why not."""
        compiled = (
            compiled_blocks(self.denoiser, self.model, self.options.backend) if mode == "compiled" else nullcontext()
        )
        try:
            if contender.measures and self.later is None:
                with depth_of(self.denoiser, self.model, self.check_at):
                    self.forwards.moment = 1
                    self.later = self.forwards.forward().float()
            self.forwards.moment = 0 if contender.measures else None
            with installed(contender, self.denoiser, self.model.padding) as handle, compiled:
                found = self.check(contender, mode)
                found |= _facts(handle)
                why = found.get("why")
                return found if why else found | self.times(contender, handle)
        except Exception as error:
            return {"why": _why(error)}
        finally:
            self.forwards.moment = None

    def check(self, contender: Contender, mode: str) -> Row:
        """Relative error of one forward, and whether the contender may show its time.

        Where a first step measures, its error is judged as that of dense contenders; the next one's is told.
        """
        found, wanted, limit = Row(), self.wanted, TOLERANCE[self.options.dtype]
        with depth_of(self.denoiser, self.model, self.check_at):
            if contender.measures and self.later is not None:
                found["measured_error"] = _distance(self.forwards.forward(), wanted)
                wanted = self.later
            error = _distance(self.forwards.forward(), wanted)
        found["relative_error"] = error
        if not all(math.isfinite(value) for value in found.values()):
            return {"why": "failed: the output is not finite"}
        if contender.kind == "removed":
            self.sensitivity[mode] = error
        elif contender.exact:
            found |= self.judge(error, limit, mode)
            if contender.kind == "visparse":
                self.exact[mode] = "why" not in found
        elif not self.exact.get(mode, False):
            found["why"] = "failed: density 1 through visparse was not right"
        elif contender.measures:
            found |= self.judge(found["measured_error"], limit, mode)
        return found

    def judge(self, error: float, limit: float, mode: str) -> Row:
        """Why a contender that must be exact may not show its time; nothing where it may."""
        if mode not in self.sensitivity:
            return {"why": "failed: not known whether the check can fail, since removed attention could not be run"}
        if self.sensitivity[mode] < _BLIND * limit:
            return {"why": "failed: attention hardly changes this output"}
        if error > limit:
            return {"why": f"failed: relative error {error:.2g}, wanted at most {limit:.2g}"}
        return {}

    def times(self, contender: Contender, handle: Handle | None) -> Row:
        """Seconds at each depth, and of the published one; the same of a step that measures, and what it keeps."""
        seconds, measured, kept, repeats = [], [], [], self.options.repeats
        counted = handle if contender.counted else None
        for point in self.points:
            with depth_of(self.denoiser, self.model, point):
                if counted is not None and contender.measures:
                    measured.append(self.time_of_measuring(counted, point))
                self.forwards.forward()
                before = None if counted is None else calls_of(counted)
                runs = self.timed()
                if counted is not None and before is not None:
                    demand_calls(counted, before, sparse=len(runs) * sum(point))
                    kept.append(state_bytes(counted))
            seconds.append(median(runs))
            repeats = min(repeats, len(runs))
        whole, per_block = self.scaled(seconds)
        row: Row = {
            "seconds": whole,
            "seconds_per_layer": dict(zip([kind.path for kind in self.model.blocks], per_block, strict=True)),
            "seconds_measured": seconds,
            "layers_measured": [list(point) for point in self.points],
            "repeats": repeats,
        }
        if measured:
            row |= {"measured_seconds": self.scaled(measured)[0], "measured_seconds_measured": measured}
            row |= {"state_bytes": round(self.scaled(kept)[0]), "state_bytes_measured": kept}
        return row

    def time_of_measuring(self, handle: Handle, point: Depth) -> float:
        """Seconds of a step that measures. The next forward is the step behind one."""
        runs: list[float] = []
        while len(runs) < self.options.repeats and sum(runs) < _PATIENCE:
            self.forwards.moment = -len(runs)  # rises, so a new run begins
            runs.append(time_once(self.forwards.forward, self.options.device))
            demand_calls(handle, Calls(0, 0, 0), measured=sum(point))
        self.forwards.moment = 1
        return median(runs)

    def timed(self) -> list[float]:
        """Seconds of some forwards."""
        runs: list[float] = []
        while len(runs) < self.options.repeats and sum(runs) < _PATIENCE:
            runs.append(time_once(self.forwards.forward, self.options.device))
        return runs

    def scaled(self, values: Sequence[float]) -> tuple[float, list[float]]:
        """A quantity at the published depth, and for one block of each kind, from its values at `points`."""
        return scale_up(self.points, values, [kind.published for kind in self.model.blocks])


def _distance(out: Tensor, wanted: Tensor) -> float:
    return float((out.float() - wanted).norm() / wanted.norm())


def _hurry(options: Options) -> None:
    if time.perf_counter() >= options.deadline:
        raise OutOfTime


def _why(error: Exception) -> str:
    if isinstance(error, OutOfTime):
        return "not run: time"
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:400]}"


def _facts(handle: Handle | None) -> Row:
    """What visparse says it did."""
    if handle is None:
        return {}
    report = handle.report().models[0]
    fallbacks: Mapping[str, int] = {why: n for layer in report.layers for why, n in layer.fallbacks.items()}
    facts: Row = {
        "impl": report.impl,
        "density": report.density,
        "block_density": report.block_density,
        "fallbacks": dict(fallbacks),
    }
    if fallbacks or any(layer.state == "not served" for layer in report.layers):
        facts["why"] = f"failed: ran dense against the plan: {'; '.join(fallbacks) or 'a layer is not served'}"
    return facts


def _blank(model: Architecture, contender: Contender, mode: str, options: Options) -> Row:
    return {
        "plan": contender.name,
        "kind": contender.kind,
        "what": contender.what,
        "without": contender.without,
        "mode": mode,
        "model": model.name,
        "model_class": model.model_class,
        "grid": list(model.grid),
        "tokens": model.tokens,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "layers": {kind.path: kind.published for kind in model.blocks},
        "dtype": str(options.dtype).removeprefix("torch."),
        "why": None,
    }
