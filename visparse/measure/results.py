"""The one form in which every measurement is kept or printed (DESIGN 4.8)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visparse.errors import check_keys

SCHEMA = 1
KINDS = ("kernels", "step", "run", "search", "quality")

_TEXT = ("plan", "label", "impl", "model", "dtype", "prompt")
_COUNT = ("tokens", "heads", "head_dim", "steps", "dense_steps", "seed", "repeats")
_NUMBER = (
    "density",
    "block_density",
    "seconds",
    "seconds_per_step",
    "milliseconds",
    "tflops",
    "ratio_to_cudnn",
    "ratio_to_fastest_dense",
    "speedup",
    "ceiling",
    "psnr",
    "psnr_min",
    "ssim",
    "ssim_min",
    "ms_ssim",
    "lpips",
    "fd",
    "latent_error",
    "attention_error",
)
_REQUIRED = {"run": ("plan", "seconds", "steps", "seed", "dtype")}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result file: what was measured, on what, with which versions and settings.

    Args:
        kind: one of `KINDS`.
        device: what `measure.environment.describe_device` returns.
        versions: package name -> version.
        date: UTC, ISO 8601, whole seconds.
        commit: git commit of visparse, with `-dirty` where the tree was changed; None outside git.
        settings: everything that the measurement was asked to do.
        rows: one mapping per measurement. Known fields are checked, others are free.
        schema: version of this form.

    Raises:
        ValueError, TypeError: a field has the wrong form; the text names it.
    """

    kind: str
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    date: str
    commit: str | None
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check every field."""
        if self.schema != SCHEMA:
            raise ValueError(f"schema: this version of visparse reads {SCHEMA}, got {self.schema!r}; update visparse")
        if self.kind not in KINDS:
            raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("device", "versions", "settings"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name}: wanted a mapping, got {type(getattr(self, name)).__name__}")
        _check_date(self.date)
        if self.commit is not None and not isinstance(self.commit, str):
            raise TypeError(f"commit: wanted text or None, got {type(self.commit).__name__}")
        if not isinstance(self.rows, Sequence) or isinstance(self.rows, str) or not self.rows:
            raise ValueError("rows: wanted a list with at least one row, got none")
        for index, row in enumerate(self.rows):
            _check_row(row, index, self.kind)

    @classmethod
    def collect(
        cls, kind: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, device: str = "cpu"
    ) -> Record:
        """A record of now: device, versions, date and commit are looked up.

        Args:
            kind: one of `KINDS`.
            settings: everything that the measurement was asked to do.
            rows: one mapping per measurement.
            device: torch name of the device that was measured, such as `"cpu"` or `"cuda:0"`.

        Returns:
            The checked record.
        """
        from visparse.measure.environment import describe_device, find_commit, find_versions

        return cls(
            kind=kind,
            device=describe_device(device),
            versions=find_versions(),
            date=datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
            commit=find_commit(),
            settings=settings,
            rows=rows,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The record in a parsed JSON object.

        Raises:
            ValueError: a key is unknown (the nearest known one is named) or missing.
        """
        known = [field.name for field in fields(cls)]
        check_keys(data, known, "result")
        missing = [name for name in known if name not in data]
        if missing:
            raise ValueError(f"result: missing {', '.join(missing)}")
        return cls(**data)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Record:
        """The record in a JSON file.

        Raises:
            ValueError: the file is no JSON object of this form.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{os.fspath(path)}: wanted a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, `schema` first."""
        data = asdict(self)
        return {"schema": data.pop("schema"), **data}

    def to_json(self) -> str:
        """The record as JSON text with two spaces of indent."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to a JSON file; folders are made.

        Returns:
            The path written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.to_json() + "\n", encoding="utf-8")
        return target


def _check_date(date: object) -> None:
    try:
        parsed = datetime.fromisoformat(date) if isinstance(date, str) else None
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(f"date: wanted ISO 8601 with a time zone, such as 2026-01-31T12:00:00+00:00, got {date!r}")


def _check_row(row: object, index: int, kind: str) -> None:
    if not isinstance(row, Mapping):
        raise TypeError(f"rows[{index}]: wanted a mapping, got {type(row).__name__}")
    for name in _REQUIRED.get(kind, ()):
        if row.get(name) is None:
            raise ValueError(f"rows[{index}]: a row of kind {kind!r} needs {name!r}")
    for name, value in row.items():
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = None
        if name in _TEXT and not isinstance(value, str):
            wanted = "text"
        elif name in _COUNT and (not number or not float(value).is_integer()):
            wanted = "a whole number"
        elif name in _NUMBER and not number:
            wanted = "a number"
        elif name == "grid" and (not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3):
            wanted = "[frames, height, width]"
        if wanted is not None:
            raise TypeError(f"rows[{index}].{name}: wanted {wanted} or null, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"rows[{index}].{name}: wanted a finite number, got {value}; JSON has no such value")
