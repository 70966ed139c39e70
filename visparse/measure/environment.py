"""Where a measurement was made: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import visparse

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "timm",
    "accelerate",
    "torchmetrics",
    "pillow",
)


def find_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, without importing them.

    Returns:
        Name -> version; None where a package is not installed.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "visparse": visparse.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_device(device: str = "cpu") -> dict[str, Any]:
    """What a device is.

    Args:
        device: torch name, such as `"cpu"` or `"cuda:0"`.

    Returns:
        `type` and `name`; for a CPU also `cores` that this process may use and torch's `threads`;
        for a GPU `memory_gib`, `capability` and the `cuda` version of torch.

    Raises:
        ValueError: the device is of another type.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return {"type": "cpu", "name": _cpu_name(), "cores": count_cores(), "threads": torch.get_num_threads()}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
        }
    raise ValueError(f"device: wanted cpu or cuda, got {device!r}")


def find_commit() -> str | None:
    """Commit of the checkout that visparse runs from.

    Returns:
        The hash, with `-dirty` where tracked files were changed; None where visparse is not run from a git checkout.
    """
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
