"""Plans by name: published configurations, for any model and grid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from visparse.compensation import Proxies, ReuseResidual, ReuseStatistics
from visparse.errors import nearest
from visparse.plan import FILE_NAME, SparsePlan
from visparse.templates import PatternTemplate


def dense() -> SparsePlan:
    """Everything dense: the model's own attention, bitwise."""
    return SparsePlan(
        name="dense",
        patterns={"dense": PatternTemplate({"name": "dense"})},
        default="dense",
        notes="the model untouched",
    )


def radial() -> SparsePlan:
    """Radial attention as published for Wan 2.1 14B text-to-video at its default length.

    The released code's mask, decay 0.2, the first layer and the first 12 of 50 steps dense (24 %).

    Source: Radial Attention, arXiv 2506.19852; released scripts for Wan 2.1.
    """
    entry = {"name": "radial", "variant": "code", "decay": 0.2, "sink": True, "block": 128}
    return SparsePlan(
        name="radial",
        patterns={"radial": PatternTemplate(entry)},
        default="radial",
        dense_steps=0.24,
        dense_layers=1,
        notes="Radial Attention (arXiv 2506.19852), released script for Wan 2.1 14B at its default length",
    )


def neighborhood() -> SparsePlan:
    """Generalized neighborhood attention as published for HunyuanVideo at 91 % sparsity.

    Window 18 x 24 x 24 and stride 16 x 8 x 8 of a grid of 30 x 48 x 80, the first 15 of 50 steps dense. Both are kept
    as shares of each axis in multiples of 2 x 8 x 8, so that the plan fits any grid and stays aligned with blocks; on
    the published grid they are the published numbers.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922, HunyuanVideo end to end.
    """
    entry = {
        "name": "neighborhood",
        "window": ["60%/2", "50%/8", "30%/8"],
        "stride": ["53%/2", "17%/8", "10%/8"],
    }
    return SparsePlan(
        name="neighborhood",
        patterns={"neighborhood": PatternTemplate(entry)},
        default="neighborhood",
        dense_steps=0.3,
        notes="GNA (arXiv 2504.16922), HunyuanVideo: window 18x24x24, stride 16x8x8 of 30x48x80, as shares of the axes",
    )


def re_ttention() -> SparsePlan:
    """Re-ttention as published for CogVideoX: a band in every frame, softmax statistics and residual.

    3.125 % of the frame's places, the first 15 of 50 steps dense; at step 15 and every fifth after it the dense and the
    sparse output are measured, and the ratio grows by 0.04 with each sparse step. Step 15 counts as dense here, hence
    16 of 50; the residual is kept in full.

    Source: Re-ttention, arXiv 2505.22918; github.com/cccrrrccc/Re-ttention.
    """
    return SparsePlan(
        name="re-ttention",
        patterns={"band": PatternTemplate({"name": "band", "share": 0.03125, "per_frame": True})},
        default="band",
        dense_steps=0.32,
        statistics=ReuseStatistics(refresh=5, ramp=0.04),
        residual=ReuseResidual(refresh=5, storage="full"),
        notes="Re-ttention (arXiv 2505.22918), CogVideoX at 96.9 %",
    )


def foveal() -> SparsePlan:
    """Foveal attention, visparse's own: sharp where it matters, pooled elsewhere, corrected by a residual.

    At the last dense step the tiles of an eighth are chosen for each head, by their mass in the softmax times the
    variance of the logits inside them; proxy tokens stand for all others; the residual of that step is added. All of it
    is measured once more at 60 % of the run. The first quarter of the steps is dense.
    """
    return SparsePlan(
        name="foveal",
        patterns={
            "foveal": PatternTemplate({"name": "top_k", "share": 0.125, "score": "mass_variance", "refresh": 0.6})
        },
        default="foveal",
        dense_steps=0.25,
        proxies=Proxies(),
        residual=ReuseResidual(refresh=0.6),
        notes="visparse's own: tiles by mass and variance of a dense step, proxy tokens, residual, one refresh",
    )


PRESETS = {
    "dense": dense,
    "foveal": foveal,
    "neighborhood": neighborhood,
    "radial": radial,
    "re-ttention": re_ttention,
}


AUTO = "auto"
SAFEST = "radial"
"""What `"auto"` means for a model without a plan. Of the sparse presets that keep nothing between steps, and so run
with any number of steps and no memory of their own, it is the one that keeps pictures best."""


def auto_plan(target: object) -> SparsePlan:
    """The plan that lies beside a model, else the safest preset; its notes say which, and why.

    Looked for is `visparse_plan.json` in the folder that the pipeline or denoiser was loaded from, and in the one above
    a denoiser's own folder. It counts only if all denoisers have the shape that it was made for. Never touches the
    network.

    Args:
        target: a diffusers pipeline, or a denoiser.

    Returns:
        The plan.

    Raises:
        ValueError: there is no known denoiser, or the file is damaged; the text names it.
        TypeError: the target is neither a pipeline nor a module.
    """
    from visparse.adapter import find_denoisers, unwrapped  # here, so that `import visparse` stays light

    denoisers = find_denoisers(target)
    why = f"no {FILE_NAME} beside the model"
    for file in _files_beside(target, [unwrapped(module) for module, _ in denoisers.values()]):
        try:
            plan = SparsePlan.from_pretrained(file)
        except ValueError as error:
            reason = str(error).removeprefix(f"{file} ").removeprefix("plan: ")
            raise ValueError(f"{file}: {reason}; mend it or take it away, or name a preset") from error
        try:
            for module, adapter in denoisers.values():
                plan.check_model(adapter.fingerprint(unwrapped(module)))
        except ValueError as error:
            why = f"{file} does not fit: {error}"
            warnings.warn(f"plan 'auto' runs {SAFEST!r}, since {why}", stacklevel=4)
            continue
        return _noted(plan, f"chosen by 'auto': {file}")
    return _noted(
        PRESETS[SAFEST](),
        f"chosen by 'auto' as the safest preset: {why}; search for one with `visparse search --model FOLDER_OR_ID "
        f"--out {FILE_NAME}` and keep it in the model's folder",
    )


def load_plan(plan: object, target: object = None) -> SparsePlan:
    """The plan that a user means.

    Args:
        plan: name of a preset, `"auto"`, path of a plan file or of a folder that holds `visparse_plan.json`, or a
            `SparsePlan`.
        target: the pipeline or denoiser that `"auto"` chooses for; see `auto_plan`.

    Raises:
        ValueError: a name that is none of these (names the nearest preset), or `"auto"` without a target.
        TypeError: not a name, a path or a plan.
    """
    if isinstance(plan, SparsePlan):
        return plan
    if isinstance(plan, str) and plan in PRESETS:
        return PRESETS[plan]()
    if plan == AUTO:
        if target is None:
            raise ValueError(
                f"plan {AUTO!r} means the plan of a model, and here is none; name a plan file, the folder of a model "
                f"that has a {FILE_NAME}, or a preset ({', '.join(PRESETS)})"
            )
        return auto_plan(target)
    if isinstance(plan, Path) or (isinstance(plan, str) and Path(plan).exists()):
        return SparsePlan.from_pretrained(plan)
    if isinstance(plan, str):
        raise ValueError(
            f"unknown plan {plan!r}{nearest(plan, [*PRESETS, AUTO])} (presets: {', '.join(PRESETS)}; {AUTO}; "
            f"or the path of a plan file, or of a folder with {FILE_NAME})"
        )
    raise TypeError(
        f"plan must be the name of a preset, a path or a SparsePlan, got {type(plan).__name__}; "
        "SparsePlan.from_dict reads a dict"
    )


def _files_beside(target: object, denoisers: list[Any]) -> Iterator[Path]:
    """Plan files in the folders that denoisers and pipeline were loaded from, each once; the denoisers' come first."""
    found: dict[Path, None] = {}
    for part in (*denoisers, target):
        name = getattr(getattr(part, "config", None), "_name_or_path", None)
        if isinstance(name, str) and name and Path(name).is_dir():
            folder = Path(name).resolve()
            is_part = (folder.parent / "model_index.json").is_file()
            found |= dict.fromkeys([folder, folder.parent] if is_part else [folder])
    return (folder / FILE_NAME for folder in found if (folder / FILE_NAME).is_file())


def _noted(plan: SparsePlan, note: str) -> SparsePlan:
    return replace(plan, notes="; ".join(filter(None, [plan.notes, note])))
