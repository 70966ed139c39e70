"""Plans by name: published configurations, for any model and grid."""

from __future__ import annotations

from pathlib import Path

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


PRESETS = {"dense": dense, "neighborhood": neighborhood, "radial": radial}


def load_plan(plan: object) -> SparsePlan:
    """The plan that a user means.

    Args:
        plan: name of a preset, path of a plan file or of a folder that holds `visparse_plan.json`, or a `SparsePlan`.

    Raises:
        ValueError: a name that is neither; names the nearest preset.
        TypeError: not a name, a path or a plan.
    """
    if isinstance(plan, SparsePlan):
        return plan
    if isinstance(plan, str) and plan in PRESETS:
        return PRESETS[plan]()
    if isinstance(plan, Path) or (isinstance(plan, str) and Path(plan).exists()):
        return SparsePlan.from_pretrained(plan)
    if isinstance(plan, str):
        raise ValueError(
            f"unknown plan {plan!r}{nearest(plan, PRESETS)} (presets: {', '.join(PRESETS)}; "
            f"or the path of a plan file, or of a folder with {FILE_NAME})"
        )
    raise TypeError(
        f"plan must be the name of a preset, a path or a SparsePlan, got {type(plan).__name__}; "
        "SparsePlan.from_dict reads a dict"
    )
