"""What a comparison is asked to do, and the settings file beside a model (`visparse_demo.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from visparse.errors import check_keys

FILE_NAME = "visparse_demo.json"
COMPARISONS = ("dense", "fewer-steps", "floor")


@dataclass(frozen=True, kw_only=True)
class PlanChoice:
    """One sparse plan of a comparison.

    Args:
        plan: preset name, or path of a plan file or folder.
        label: what tables and pages call it; see `name` where it is None.
        overrides: keyword arguments for `visparse.sparsify`.
    """

    plan: str
    label: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of the overrides that no plan can have."""
        for name in ("target", "plan"):
            if name in self.overrides:
                raise ValueError(
                    f"overrides of {self.name!r}: {name!r} cannot be overridden; choose the plan by its name"
                )

    @property
    def name(self) -> str:
        """The label; without one the preset, or the name of the plan's file without its folder and ending."""
        return self.label or Path(self.plan).stem


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that `visparse.run.compare` is asked to do.

    Args:
        model: folder or hub id of a diffusers pipeline.
        prompt, negative_prompt: text.
        height, width: pixels. num_frames: frames. num_inference_steps: steps. None: the pipeline's own default.
        guidance_scale: 1 turns guidance off; None: the pipeline's own default.
        seed: of the CPU generator that draws the noise.
        fps: frames a second of the pictures on the page.
        plans: sparse plans, in the order of the table.
        compare: which of `COMPARISONS` stand beside them; dense always does.
        repeats: timed generations per row; the median counts.
        device, dtype: see `visparse.measure.generate.load_pipeline`.

    Raises:
        ValueError: an argument is out of range; the text names it.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    fps: float = 8.0
    plans: Sequence[PlanChoice] = (PlanChoice(plan="radial"),)
    compare: Sequence[str] = COMPARISONS
    repeats: int = 1
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("height", "width", "num_frames", "num_inference_steps", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        if self.fps <= 0:
            raise ValueError(f"fps: wanted more than 0, got {self.fps}")
        for name in self.compare:
            if name not in COMPARISONS:
                raise ValueError(f"compare: wanted some of {', '.join(COMPARISONS)}, got {name!r}")
        names = [choice.name for choice in self.plans]
        for name in names:
            if name in COMPARISONS:
                raise ValueError(f"plans: {name!r} is always a row of its own; name sparse plans only, or set a label")
            if names.count(name) > 1:
                raise ValueError(f"plans: {name!r} is there twice; give each a label, or its file a name, of its own")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        data = asdict(self)
        data["plans"] = [{**asdict(choice), "overrides": dict(choice.overrides)} for choice in self.plans]
        data["compare"] = list(self.compare)
        return data


_FILE_KEYS = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "fps",
    "plans",
)


def read_demo_settings(folder: Path) -> dict[str, Any]:
    """Read `visparse_demo.json` from the folder of a model.

    The file is a JSON object: `"schema": 1` and any of `prompt`, `negative_prompt`, `height`, `width`, `num_frames`,
    `num_inference_steps`, `guidance_scale`, `seed`, `fps` (as in `RunSettings`), and `plans`, a list of
    `{"plan", "label", "overrides"}`. A plan that ends in `.json` is a path inside the folder.

    Args:
        folder: folder of a diffusers pipeline.

    Returns:
        Keyword arguments for `RunSettings`; empty where the folder has no such file.

    Raises:
        ValueError: wrong schema, or an unknown key (the nearest known one is named).
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.pop("schema", None) != 1:
        raise ValueError(f'{path}: wanted a JSON object with "schema": 1')
    check_keys(data, _FILE_KEYS, str(path))
    if "plans" in data:
        data["plans"] = tuple(
            _read_choice(entry, folder, f"{path}: plans[{i}]") for i, entry in enumerate(data["plans"])
        )
    return data


def _read_choice(entry: object, folder: Path, where: str) -> PlanChoice:
    if not isinstance(entry, dict) or not isinstance(entry.get("plan"), str):
        raise ValueError(f'{where}: wanted an object with a "plan"')
    check_keys(entry, [f.name for f in fields(PlanChoice)], where)
    plan = entry["plan"]
    if plan.endswith(".json"):
        plan = str(folder / plan)
    return PlanChoice(plan=plan, label=entry.get("label"), overrides=entry.get("overrides") or {})
