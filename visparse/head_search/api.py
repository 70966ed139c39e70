"""`visparse.search`: which pattern serves which head, found offline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visparse.head_search.settings import SearchSettings, read_prompts
from visparse.patterns.base import Pattern
from visparse.plan import SparsePlan
from visparse.run import Progress


def search(
    target: Any,
    *,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    inputs: Sequence[Sequence[Any]] = (),
    images: Any = None,
    size: tuple[int, int] | None = None,
    speedup: float | None = None,
    attention: float | None = None,
    density: float | None = None,
    max_error: float | None = None,
    steps: int | None = None,
    call: Mapping[str, Any] | None = None,
    work: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> SparsePlan:
    """Search a plan: for every head the pattern with which the least is lost within one budget.

    The model runs dense on the calibration prompts. At a few steps the error of every candidate is found for every
    head, on a sample of queries, after the output projection and relative to the layer's output. One allocation over
    all heads of all layers then spends the budget of measured milliseconds where it saves the most error. Nothing is
    left on the model, also after an error.

    Args:
        target: a diffusers pipeline, a denoiser or a timm vision transformer that runs dense.
        prompts: path of a text file with one prompt a line, or the prompts; None for pipelines without any.
        inputs: of a bare denoiser: runs, each a list with the keyword arguments of every step (or a list of them).
        images: of a vision transformer, in place of prompts: a folder, or tensors [B, 3, H, W] as the model takes them,
            PIL pictures and paths, which are scaled and normalised as its `pretrained_cfg` says. `dense_steps` is 0.
        size: (height, width) in pixels that pictures are scaled to; None: that of the model.
        speedup: goal: the denoising of a run this many times faster, dense steps counted.
        attention: goal: time of attention in a sparse step, as a share of dense attention.
        density: goal: visited blocks in a sparse step, as a share of all.
        max_error: goal: predicted relative error of attention's output; the cheapest plan below it.
        steps: of a run; None: the pipeline's default.
        call: further arguments of the pipeline's call, such as height, width, num_frames, guidance_scale.
        work: path of a work file. With it a search that was stopped goes on where it was, and one with another goal
            uses the same scores.
        candidates: beginnings of the names of candidates; None: all of `visparse.head_search.candidates`.
        patterns: more candidates, by name.
        progress: told about every step.
        settings: what may be chosen: `family` (``"plain"``: exact masks; ``"foveal"``: whole tiles, proxies for the
            others, and the residual of a dense step; ``"pooled"``: tiles by pooled scores and proxies, nothing is
            reused, for models without steps; ``"best"``: plain, and foveal where there are dense steps, else pooled),
            `rule` (``"sparse-vdit"``: as published, with `limit` as its epsilon), `dense_steps` (number or share),
            `refresh` (when what is reused is measured again), `ranges` (True: the stretches of steps between two
            measurements are allocated each on its own), `per_tile` (proxies of each tile),
            `blocks` ((queries, keys) of a tile; None: those that a Hopper GPU likes).
            How it is scored: `grid` ((frames, height, width) in tokens that the call should have; height, width and
            num_frames follow from it, and another grid than this one is an error), `judge` (steps that are scored),
            `rows` (sampled tiles of queries; None: all), `every` (every so many of their queries), `seed`.
            What it costs: `rates` (device whose rates count; None: this one), `probe` (True: two plans of each family
            run for a few steps, and costs are brought to what they took; not with the rates of another device),
            `share` (of attention in a dense step; None: measured).
            What the output says, on the first four prompts or images: `refine` (so many allocations are judged by
            decoded frames, or by what a vision transformer returns: give it with the head whose output counts; the
            best one is taken; 0: none; the first four are fixed ways to weigh errors, those after them change the
            weight of one group of layers at a time), `weigh` (so many groups of layers are made sparse alone, in each
            range of steps; the error of the output says what each weighs; 0: all alike),
            `try_dense_steps` and `try_refresh` (other schedules at the same `speedup`; the best one is taken).
            Besides: `minutes` (what is not scored by then stays dense, and nothing is judged after it), `name`.

    Returns:
        The plan; its `measured` holds what is predicted, and what was judged (`output_errors`, `weights`,
        `climb`, `schedules`); its `notes` say what is missing.

    Raises:
        ValueError: a setting is out of its range, the goal is beyond the ceiling or the budget too small, the work file
            is of another search, or nothing could be scored.
        TypeError: an unknown setting, or images that are none.
        FileNotFoundError: no file of prompts, or of images.

    Source: visparse's own; the idea is Sparse-vDiT's, arXiv 2506.03065.
    """
    from visparse.head_search.images import runs_of
    from visparse.head_search.searcher import Searcher

    if images is not None or size is not None:
        if images is None or inputs or prompts is not None:
            raise ValueError(
                "images: wanted them in place of prompts and inputs, and size only with them; give one of the three"
            )
        inputs = runs_of(target, images, size)
        settings.setdefault("dense_steps", 0)
    if prompts is None:
        texts: Sequence[str] = ()
    elif isinstance(prompts, (str, os.PathLike)):
        texts = read_prompts(os.fspath(prompts))
    else:
        texts = prompts
    chosen = SearchSettings(
        prompts=tuple(texts),
        call=dict(call or {}),
        steps=steps,
        speedup=speedup,
        attention=attention,
        density=density,
        max_error=max_error,
        candidates=None if candidates is None else tuple(candidates),
        patterns=dict(patterns or {}),
        work=None if work is None else Path(work),
        **settings,
    )
    return Searcher(target, chosen, inputs=inputs, progress=progress).search()
