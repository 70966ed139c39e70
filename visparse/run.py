"""Generate the same video dense and sparse, from one seed, and measure time and quality."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visparse.measure.attention import RolledKeys, SelfAttentionProbe, amdahl_ceiling
from visparse.measure.coverage import Coverage, read_coverage
from visparse.measure.generate import Generation, Request, default_arguments, generate, load_pipeline
from visparse.measure.quality import latent_error, psnr_per_frame, ssim_per_frame
from visparse.measure.results import Record
from visparse.measure.settings import PlanChoice, RunSettings
from visparse.presets import AUTO


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Args:
        record: the numbers, one row per variant, dense first.
        films: label of the row -> frames `[frames, height, width, 3]`, uint8.
    """

    record: Record
    films: Mapping[str, torch.Tensor]


class Progress:
    """Counts denoiser steps; this one shows nothing. `visparse.cli` shows a bar."""

    def expect(self, steps: int) -> None:
        """More steps will come."""

    def start(self, label: str) -> None:
        """A variant begins."""

    def tick(self) -> None:
        """One step is done."""


def compare(settings: RunSettings, *, progress: Progress | None = None) -> Comparison:
    """Run every variant of a comparison and measure it against dense.

    Before anything is timed, every plan is applied, then dense and all plans make untimed steps. A bad plan
    so fails early, and first-call costs (thread pools, compiled kernels, block lists) do not count.

    Args:
        settings: what to compare.
        progress: told about every denoiser step.

    Returns:
        The record and the frames.

    Raises:
        ValueError: the model, a plan or a setting does not fit; the text says which.
    """
    begin = time.perf_counter()
    pipe, dtype = load_pipeline(settings.model, device=settings.device, dtype=settings.dtype)
    bench = _Bench(pipe, settings, dtype, time.perf_counter() - begin, progress or Progress())
    for choice in settings.plans:
        _sparsify(pipe, choice).restore()
    bench.probe_dense()
    for choice in settings.plans:
        bench.warm_up(choice)
    bench.run_dense()
    for choice in settings.plans:
        bench.run_plan(choice)
    if "fewer-steps" in settings.compare:
        bench.run_fewer_steps()
    if "floor" in settings.compare:
        bench.run_floor()
    return bench.finish()


class _Bench:
    """One loaded pipeline, and the rows measured with it so far."""

    def __init__(self, pipe: Any, settings: RunSettings, dtype: str, load_seconds: float, progress: Progress) -> None:
        self.pipe = pipe
        self.settings = settings
        self.progress = progress
        self.steps = settings.num_inference_steps or int(default_arguments(pipe)["num_inference_steps"])
        self.request = Request(
            **{name: getattr(settings, name) for name in Request.__dataclass_fields__}  # the names are the same
        )
        self.load_seconds = load_seconds
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.films: dict[str, torch.Tensor] = {}
        self.share_of_step: float | None = None
        self.dense: Generation
        self.facts: dict[str, Any] = {
            "model": model_name(settings.model),
            "dtype": dtype,
            "seed": settings.seed,
            "prompt": settings.prompt,
            "repeats": settings.repeats,
        }
        runs = 1 + len(settings.plans) + ("floor" in settings.compare)
        progress.expect(runs * settings.repeats * self.steps + 2 + len(settings.plans))

    def probe_dense(self) -> None:
        """Two untimed dense steps; the second tells the share of self-attention and the number of tokens."""
        probe, marks = SelfAttentionProbe(), [0.0]

        def tick() -> None:
            marks.append(time.perf_counter())
            if len(marks) == 2:
                probe.reset()
            self.progress.tick()

        self.progress.start("warm-up")
        with probe:
            generate(self.pipe, self.request, steps=2, tick=tick)
        if probe.calls == 0 or probe.shape is None:
            self.notes.append(
                "No call of scaled_dot_product_attention was seen: share of attention, ceiling and floor are unknown."
            )
            return
        self.share_of_step = min(probe.seconds / (marks[2] - marks[1]), 1.0)
        self.facts.update(heads=probe.shape[1], tokens=probe.shape[2], head_dim=probe.shape[3])

    def run_dense(self) -> None:
        """The untouched pipeline: the reference of every other row."""
        self.dense = self._repeat("dense", self.steps)
        self._add("dense", "dense", self.dense, Coverage.dense(self.steps))

    def warm_up(self, choice: PlanChoice) -> None:
        """One untimed sparse step of a plan, so that it compiles what the timed ones need.

        A dense step comes before it only where the plan has to measure something.
        """
        self.progress.start(f"{choice.name}: warm-up")
        dense = int(_sparsify(self.pipe, choice).plan.measures)
        warm = PlanChoice(plan=choice.plan, overrides={**choice.overrides, "dense_steps": dense})
        with _sparsify(self.pipe, warm):
            generate(self.pipe, self.request, steps=1 + dense, tick=self.progress.tick)

    def run_plan(self, choice: PlanChoice) -> None:
        """One sparse plan, timed."""
        with _sparsify(self.pipe, choice) as handle:
            made = self._repeat(choice.name, self.steps)
            coverage = read_coverage(handle.report().to_dict())
        if choice.plan == AUTO:
            self.notes.append(f"{choice.name}: plan {handle.plan.name!r}; {handle.plan.notes}")
        self.notes += [f"{choice.name}: {reason}" for reason in coverage.fallbacks]
        self._add(Path(choice.plan).name, choice.name, made, coverage)

    def run_fewer_steps(self) -> None:
        """Dense with as many steps as fit into the time of the fastest sparse plan."""
        sparse = [row for row in self.rows if row["plan"] != "dense"]
        if not sparse:
            self.notes.append("No sparse plan was run, so there is no equal time for fewer steps.")
            return
        fastest = min(sparse, key=lambda row: row["seconds"])
        steps = equal_time_steps(fastest["seconds"], self.dense)
        if steps >= self.steps:
            self.notes.append("No sparse plan was faster than dense, so there is no run with fewer steps.")
            return
        self.progress.expect(steps * self.settings.repeats)
        made = self._repeat("fewer-steps", steps)
        self._add("fewer-steps", f"dense, {steps} steps", made, Coverage.dense(steps))
        if steps == 1 and made.seconds > fastest["seconds"]:
            self.notes.append(f"One dense step takes longer than {fastest['label']} in all.")

    def run_floor(self) -> None:
        """Dense once more with keys and values in another order: as exact, other rounding."""
        if self.share_of_step is None:
            return
        rolled = RolledKeys()
        made = self._repeat("floor", self.steps, rolled)
        if rolled.calls == 0:
            self.notes.append("All attention calls have a mask, so there is no floor.")
        else:
            self._add("floor", "dense again (floor)", made, Coverage.dense(self.steps))

    def finish(self) -> Comparison:
        """The record of all rows."""
        settings = {
            **self.settings.to_dict(),
            "model": model_name(self.settings.model),
            "height": self.dense.frames.shape[1],
            "width": self.dense.frames.shape[2],
            "num_frames": self.dense.frames.shape[0],
            "num_inference_steps": self.steps,
            "load_seconds": round(self.load_seconds, 3),
            "attention_share_of_step": self.share_of_step,
            "floor": "keys and values rolled by about half their number: exact, with another order of addition",
            "notes": self.notes,
        }
        device = str(self.pipe._execution_device)
        return Comparison(record=Record.collect("run", settings, self.rows, device=device), films=self.films)

    def _repeat(self, label: str, steps: int, around: AbstractContextManager[Any] | None = None) -> Generation:
        """The generation of median time among the repeats."""
        made = []
        self.progress.start(label)
        for _ in range(self.settings.repeats):
            with around or nullcontext():
                made.append(generate(self.pipe, self.request, steps=steps, tick=self.progress.tick))
        return sorted(made, key=lambda one: one.seconds)[(len(made) - 1) // 2]

    def _add(self, plan: str, label: str, made: Generation, coverage: Coverage) -> None:
        row = {
            "plan": plan,
            "label": label,
            **self.facts,
            **coverage.to_dict(),
            "steps": made.steps,
            "seconds": made.seconds,
            "seconds_per_step": made.seconds_per_step,
            "seconds_text": made.seconds_text,
            "seconds_denoise": made.seconds_denoise,
            "seconds_decode": made.seconds_decode,
            "speedup": self.dense.seconds / made.seconds,
            "ceiling": self._ceiling(coverage) if plan not in ("dense", "floor", "fewer-steps") else None,
            **(compare_videos(made, self.dense) if plan != "dense" else {}),
        }
        self.rows.append(row)
        self.films[label] = made.frames

    def _ceiling(self, coverage: Coverage) -> float | None:
        if self.share_of_step is None or coverage.run_block_density is None:
            return None
        share = self.share_of_step * self.dense.seconds_denoise / self.dense.seconds
        return amdahl_ceiling(share, coverage.run_block_density)


def compare_videos(made: Generation, dense: Generation) -> dict[str, Any]:
    """Quality of one generation against the dense one.

    Args:
        made, dense: generations of the same request.

    Returns:
        PSNR (dB, at most 100) and SSIM: mean, minimum and per frame; `identical` frames; relative error of the latents.
    """
    psnr, ssim = psnr_per_frame(made.frames, dense.frames), ssim_per_frame(made.frames, dense.frames)
    return {
        "psnr": sum(psnr) / len(psnr),
        "psnr_min": min(psnr),
        "psnr_frames": psnr,
        "ssim": sum(ssim) / len(ssim),
        "ssim_min": min(ssim),
        "ssim_frames": ssim,
        "identical": bool(torch.equal(made.frames, dense.frames)),
        "latent_error": latent_error(made.latents, dense.latents),
    }


def equal_time_steps(seconds: float, dense: Generation) -> int:
    """How many dense steps fit into a time, text and decoding counted; at least 1.

    Args:
        seconds: end to end.
        dense: a dense generation with its times.
    """
    fixed = dense.seconds - dense.seconds_denoise
    return max(int((seconds - fixed) / dense.seconds_per_step), 1)


def model_name(model: str) -> str:
    """What results call a model: the hub id, or the last part of a folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _sparsify(pipe: Any, choice: PlanChoice) -> Any:
    import visparse

    return visparse.sparsify(pipe, choice.plan, **choice.overrides)
