"""Settings: what a search is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visparse.compensation import Proxies
from visparse.compensation.refresh import parse_refresh
from visparse.errors import nearest
from visparse.head_search.candidates import FAMILIES
from visparse.patterns import Pattern

GOALS = ("speedup", "attention", "density", "max_error")
RULES = ("budget", "sparse-vdit")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search is asked to do; `visparse.search` says what each means.

    Raises:
        ValueError: a value is out of its range, or not exactly one goal is given.
    """

    prompts: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    steps: int | None = None
    speedup: float | None = None
    attention: float | None = None
    density: float | None = None
    max_error: float | None = None
    family: str = "best"
    rule: str = "budget"
    limit: float = 1.0
    candidates: tuple[str, ...] | None = None
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    dense_steps: int | float = 0.25
    refresh: float | int | None = 0.6
    ranges: bool = False
    per_tile: int = 1
    blocks: tuple[int, int] | None = None
    judge: int = 4
    rows: int | None = 12
    every: int = 4
    seed: int = 0
    rates: str | None = None
    share: float | None = None
    minutes: float | None = None
    refine: int = 0
    weigh: int = 0
    try_dense_steps: tuple[int | float, ...] = ()
    try_refresh: tuple[float | int | None, ...] = ()
    probe: bool = True
    work: Path | None = None
    name: str = "searched"

    def __post_init__(self) -> None:
        """Check every field."""
        if self.rule not in RULES:
            raise ValueError(f"rule: wanted one of {', '.join(RULES)}, got {self.rule!r}{nearest(self.rule, RULES)}")
        given = [name for name in GOALS if getattr(self, name) is not None]
        if self.rule == "sparse-vdit" and (given or self.family == "foveal"):
            raise ValueError(
                f"rule: the published one has no budget and no compensation, got {given[0] if given else 'foveal'}; "
                "leave it out and set limit (the paper's epsilon)"
            )
        if self.rule == "budget" and len(given) != 1:
            raise ValueError(
                f"goal: wanted exactly one of {', '.join(GOALS)}, got {' and '.join(given) or 'none'}; "
                "attention=0.25 is a quarter of the time of dense attention"
            )
        if self.speedup is not None and not self.speedup > 1:
            raise ValueError(f"speedup: wanted more than 1, got {self.speedup}; 1.5 is usual")
        for name in ("attention", "density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: wanted a share in (0, 1] of dense attention, got {value}; 0.25 is usual")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise ValueError(f"max_error: wanted a relative error in (0, 1), got {self.max_error}; 0.05 is small")
        if self.family not in (*FAMILIES, "best"):
            raise ValueError(
                f"family: wanted best, {', '.join(FAMILIES)}, got {self.family!r}{nearest(self.family, FAMILIES)}"
            )
        if self.every not in (1, 2, 4):
            raise ValueError(f"every: wanted 1, 2 or 4 (every so many queries of a tile), got {self.every!r}")
        for name, low in (("judge", 1), ("rows", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise ValueError(f"{name}: wanted an int of at least {low}, got {value!r}")
        if type(self.dense_steps) not in (int, float) or not (
            self.dense_steps >= 0 if type(self.dense_steps) is int else 0 < self.dense_steps < 1
        ):
            raise ValueError(
                f"dense_steps: wanted an int of at least 0 or a share in (0, 1) of the run, got {self.dense_steps!r}; "
                "0.25 is usual"
            )
        Proxies(per_tile=self.per_tile, blocks=self.blocks)  # its own check
        if self.dense_steps == 0 and self.family == "foveal":
            raise ValueError(
                "dense_steps: wanted at least 1 with family='foveal', got 0: what it reuses is measured at the last "
                "dense step; use family='pooled', which reuses nothing"
            )
        for name in ("ranges", "probe"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: wanted True or False, got {getattr(self, name)!r}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: wanted attention's share of a dense step in (0, 1), got {self.share}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: wanted more than 0, got {self.minutes}; 10 is usual")
        for name in ("refine", "weigh"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: wanted an int of at least 0, got {value!r}; 4 is usual")
        tried = next((name for name in ("try_dense_steps", "try_refresh") if getattr(self, name)), None)
        for name, wanted in (("weigh", self.weigh), (tried or "", tried)):
            if wanted and not self.refine:
                raise ValueError(f"{name}: it is judged by the model's output, which needs refine; use refine=4")
        if tried and self.speedup is None:
            raise ValueError(f"{tried}: schedules are compared at one speed-up of the run; give the goal as speedup")
        if self.refine and (self.max_error is not None or self.rule != "budget"):
            raise ValueError("refine: wanted a goal of time or blocks, got max_error or a published rule; leave it out")
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompts: wanted texts that are not empty, got {prompt!r}; leave empty lines out")
        parse_refresh(self.refresh)

    @property
    def families(self) -> tuple[str, ...]:
        """The families to score."""
        if self.rule == "sparse-vdit":
            return ("plain",)
        if self.family == "best":
            return "plain", "foveal" if self.dense_steps else "pooled"
        return (self.family,)

    @property
    def goal(self) -> str:
        """Name of the goal."""
        return next((name for name in GOALS if getattr(self, name) is not None), "sparse-vdit")


def read_prompts(path: str | Path) -> Sequence[str]:
    """Read prompts from a text file, one a line; empty lines do not count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts: no file {file}; wanted a text file with one prompt a line")
    found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"prompts: {file} holds no prompt; write one a line")
    return found
