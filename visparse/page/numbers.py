"""The numbers of a result as a person reads them: shared by the printed table and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visparse.measure.quality import PSNR_CAP
from visparse.measure.results import Record

Row = Mapping[str, Any]

COLUMNS = (
    ("plan", "label"),
    ("seconds", "end to end"),
    ("s/step", "mean of the denoiser steps"),
    ("speed-up", "end to end, against dense"),
    ("ceiling", "speed-up if sparse attention cost exactly its block density (Amdahl)"),
    ("density", "kept pairs over all pairs, in sparse calls"),
    ("block density", "visited blocks over all blocks, in sparse calls: what is paid for"),
    ("over the run", "block density with dense steps and layers counted"),
    ("PSNR", "dB against dense, mean over frames (minimum)"),
    ("SSIM", "against dense, mean over frames (minimum)"),
    ("latent error", "relative, before decoding"),
)


def column_table(record: Record) -> list[list[str]]:
    """One list of cells per row, in the order of `COLUMNS`."""
    return [_cells(row) for row in record.rows]


def _cells(row: Row) -> list[str]:
    dense = row["plan"] == "dense"
    return [
        str(row["label"]),
        number(row["seconds"], 2),
        number(row.get("seconds_per_step"), 3),
        times(row.get("speedup")),
        times(row.get("ceiling")),
        percent(row.get("density")),
        percent(row.get("block_density")),
        percent(row.get("run_block_density")),
        "reference" if dense else psnr_text(row),
        "reference" if dense else _pair(row, "ssim", 4),
        "0" if dense else _small(row.get("latent_error")),
    ]


def psnr_text(row: Row) -> str:
    """PSNR with its minimum; says so where the frames are identical."""
    if row.get("psnr") is None:
        return "–"
    if row.get("identical"):
        return "identical"
    low = row["psnr_min"]
    return f"{_capped(row['psnr'])} ({_capped(low)})"


def headline(record: Record) -> list[tuple[str, str]]:
    """Three figures for the top of the page: speed-up, quality and floor of the fastest sparse plan."""
    sparse = [row for row in record.rows if row["plan"] not in ("dense", "floor", "fewer-steps")]
    by_plan = {row["plan"]: row for row in record.rows}
    figures = []
    if sparse:
        best = min(sparse, key=lambda row: row["seconds"])
        figures.append((times(best["speedup"]), f"{best['label']}, end to end, against dense"))
        figures.append((_psnr_short(best), f"{best['label']} against dense, PSNR"))
    if "fewer-steps" in by_plan:
        fewer = by_plan["fewer-steps"]
        figures.append((_psnr_short(fewer), f"{fewer['label']} against dense, PSNR, in about the same time"))
    if "floor" in by_plan:
        figures.append((_psnr_short(by_plan["floor"]), "dense against dense, PSNR: the floor of rounding"))
    return figures


def verdict(row: Row) -> str:
    """One line under a picture."""
    if row["plan"] == "dense":
        return f"{row['seconds']:.1f} s, the reference"
    return f"{row['seconds']:.1f} s, {times(row['speedup'])}, PSNR {_psnr_short(row)}"


def fact_list(record: Record) -> list[tuple[str, str]]:
    """Everything that a figure needs beside it: device, versions, steps, seed, dtype, date."""
    row, settings, device = record.rows[0], record.settings, record.device
    grid = next((other["grid"] for other in record.rows if other.get("grid")), None)
    parts = [str(device.get("name"))]
    if "threads" in device:
        parts.append(f"{device['threads']} threads, {device['cores']} cores")
    if "memory_gib" in device:
        parts.append(f"{device['memory_gib']} GiB, CUDA {device.get('cuda')}")
    guidance = settings.get("guidance_scale")
    share = settings.get("attention_share_of_step")
    facts = [
        ("model", row.get("model")),
        ("prompt", row.get("prompt")),
        ("size", f"{settings['num_frames']} frames of {settings['width']} × {settings['height']} pixels"),
        ("tokens", _tokens(row, grid)),
        ("heads", f"{row['heads']} × {row['head_dim']}" if row.get("heads") else None),
        ("steps", "; ".join(_steps(other) for other in record.rows)),
        ("guidance", None if guidance is None else "off" if guidance <= 1 else str(guidance)),
        ("seed", str(row["seed"])),
        ("dtype", row["dtype"]),
        ("repeats", f"{row['repeats']}, the median counts" if row.get("repeats", 1) > 1 else "1"),
        ("implementations", ", ".join(sorted({other["impl"] for other in record.rows if other.get("impl")}))),
        ("self-attention", None if share is None else f"{share:.0%} of a dense step"),
        ("dense parts", f"text {row['seconds_text']:.2f} s, decoding {row['seconds_decode']:.2f} s"),
        ("loading", f"{settings['load_seconds']:.1f} s, not counted"),
        ("device", ", ".join(parts)),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items() if version)),
        ("date", record.date),
        ("commit", record.commit or "not run from a git checkout"),
    ]
    return [(name, str(value)) for name, value in facts if value]


def number(value: float | None, digits: int) -> str:
    """A number with fixed digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A factor such as 1.83×, or a dash."""
    return "–" if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """A share such as 12.5 %, or a dash."""
    return "–" if value is None else f"{value * 100:.1f} %"


def _pair(row: Row, name: str, digits: int) -> str:
    if row.get(name) is None:
        return "–"
    return f"{row[name]:.{digits}f} ({row[name + '_min']:.{digits}f})"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _capped(value: float) -> str:
    return f">= {PSNR_CAP:.0f}" if value >= PSNR_CAP else f"{value:.1f}"


def _psnr_short(row: Row) -> str:
    if row.get("identical"):
        return "identical"
    return f"{_capped(row['psnr'])} dB"


def _tokens(row: Row, grid: list[int] | None) -> str | None:
    if not row.get("tokens"):
        return None
    return f"{row['tokens']:,}" + (f" = grid {' × '.join(map(str, grid))}" if grid else "")


def _steps(row: Row) -> str:
    dense = row.get("dense_steps")
    if row["plan"] in ("dense", "floor", "fewer-steps") or dense is None:
        return f"{row['label']}: {row['steps']}"
    return f"{row['label']}: {row['steps']}, of them {dense} dense"
