"""Time of one denoiser forward of real architectures, with random weights and few layers, scaled to all layers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from visparse.bench.models import Architecture
from visparse.bench.step_build import build, compiled_blocks, depth_of, make_inputs
from visparse.bench.step_contenders import JUDGE, Contender, contenders, installed
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
        repeats: timed forwards at each depth; the median counts.
        compiled: measure each contender with compiled blocks too.
        backend: of torch.compile.
        deadline: `time.perf_counter()` at which nothing new is begun.
        notify: told what was measured, a line at a time.
        seed: of weights and inputs.
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

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.layers < 2:
            raise ValueError(f"layers: wanted at least 2, got {self.layers}; time per layer comes from two depths")
        if self.repeats < 1:
            raise ValueError(f"repeats: wanted at least 1, got {self.repeats}")


def measure(model: Architecture, options: Options) -> list[Row]:
    """One row for each contender, eager and (if wanted) compiled. What fails or no longer fits is a row that says so.

    Args:
        model: what to measure.
        options: how.

    Returns:
        The rows; see `visparse.bench.step_rows.complete` for ratios.
    """
    modes = ["eager", "compiled"] if options.compiled else ["eager"]
    todo = [(mode, contender) for mode in modes for contender in contenders(model, options.device)]
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
        self.inputs = make_inputs(model, device, dtype, seed + 1)
        self.sensitivity: dict[str, float] = {}
        self.exact: dict[str, bool] = {}
        with depth_of(self.denoiser, model, self.check_at):
            self.wanted = self.forward().float()

    @torch.no_grad()
    def forward(self) -> Tensor:
        _hurry(self.options)
        return self.denoiser(**self.inputs, return_dict=False)[0]

    def row(self, contender: Contender, mode: str) -> Row:
        """What one contender gives: times, or why not."""
        compiled = (
            compiled_blocks(self.denoiser, self.model, self.options.backend) if mode == "compiled" else nullcontext()
        )
        try:
            with installed(contender, self.denoiser, self.model.padding) as handle, compiled:
                found = self.check(contender, mode)
                found |= _facts(handle)
                why = found.get("why")
                return found if why else found | self.times()
        except Exception as error:
            return {"why": _why(error)}

    def check(self, contender: Contender, mode: str) -> Row:
        """Relative error of one forward, and whether the contender may show its time."""
        with depth_of(self.denoiser, self.model, self.check_at):
            out = self.forward().float()
        error = float((out - self.wanted).norm() / self.wanted.norm())
        if not torch.isfinite(out).all():
            return {"why": "failed: the output is not finite"}
        limit, found = TOLERANCE[self.options.dtype], Row(relative_error=error)
        if contender.kind == "removed":
            self.sensitivity[mode] = error
        elif contender.exact:
            found |= self.judge(error, limit, mode)
            if contender.kind == "visparse":
                self.exact[mode] = "why" not in found
        elif not self.exact.get(mode, False):
            found["why"] = "failed: density 1 through visparse was not right"
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

    def times(self) -> Row:
        """Seconds at each depth, and of the published one."""
        seconds, repeats = [], self.options.repeats
        for point in self.points:
            with depth_of(self.denoiser, self.model, point):
                self.forward()
                runs: list[float] = []
                while len(runs) < self.options.repeats and sum(runs) < _PATIENCE:
                    runs.append(time_once(self.forward, self.options.device))
            seconds.append(median(runs))
            repeats = min(repeats, len(runs))
        whole, per_block = scale_up(self.points, seconds, [kind.published for kind in self.model.blocks])
        return {
            "seconds": whole,
            "seconds_per_layer": dict(zip([kind.path for kind in self.model.blocks], per_block, strict=True)),
            "seconds_measured": seconds,
            "layers_measured": [list(point) for point in self.points],
            "repeats": repeats,
        }


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
