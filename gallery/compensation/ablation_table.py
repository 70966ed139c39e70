"""The result as a table in text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = (
    f"{'row':58} {'blocks':>6} {'of run':>6} {'PSNR':>6} {'SSIM':>6} {'latent':>6} {'s':>7} {'attn':>5} "
    f"{'rival':>6}      {'from':>6} {'ideal':>6} {'MiB':>6}"
)
_LEGEND = """\
blocks: visited at sparse steps; of run: over all steps. s: denoiser steps of one clip. attn: time of attention, dense
run = 1. rival: PSNR of dense with fewer steps in equal time; then whether the row beats it. from: share of a dense step
that attention must take for that (ideal: if attention cost exactly the blocks that it visits). MiB: kept, a clip."""


def table(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Dense runs, then the sparse ones by the density that was wanted and by PSNR, best first.

    Args:
        rows: of the record.
        settings: of the record.
    """
    dense = [row for row in rows if row["plan"] != "sparse"]
    sparse = sorted(
        (row for row in rows if row["plan"] == "sparse"), key=lambda row: (row["target"] or 1.0, -row["psnr"])
    )
    lines = [_HEAD, *map(_line, dense)]
    last: object = ()
    for row in sparse:
        lines += [""] if row["target"] != last else []
        last = row["target"]
        lines.append(_line(row))
    share = next((row.get("attention_share") for row in rows if row["plan"] == "dense"), None)
    lines += ["", _LEGEND]
    if share is not None:
        lines.append(f"attention takes {share:.0%} of a dense step here.")
    lines += [_decided(row) for row in sparse if "refreshed_at" in row]
    again = settings.get("dense_seconds_at_end")
    if again:
        lines.append(f"dense again at the end: {', '.join(f'{value:.3f} s' for value in again)}")
    if settings.get("not_run"):
        lines.append(f"not run ({len(settings['not_run'])}): {'; '.join(settings['not_run'])}")
    lines += [f"failed: {text}" for text in settings.get("failed", [])]
    if settings.get("left_out"):
        lines.append(f"left out, with other static patterns: {'; '.join(settings['left_out'])}")
    return "\n".join(lines)


def _decided(row: Mapping[str, Any]) -> str:
    counts = Counter(", ".join(map(str, steps)) or "none" for steps in row["refreshed_at"])
    found = "; ".join(f"{steps} ({count} of {counts.total()})" for steps, count in counts.items())
    return f"{row['label']}: steps measured again, by batches: {found}"


def _line(row: Mapping[str, Any]) -> str:
    state = row.get("state_bytes_per_clip")
    beats = {True: "wins", False: "no", None: ""}[row.get("beats_rival")]
    return (
        f"{row['label']:58} {_percent(row.get('block_density')):>6} {_percent(row.get('run_block_density')):>6} "
        f"{_number(row.get('psnr'), 2):>6} {_number(row.get('ssim'), 3):>6} {_number(row.get('latent_error'), 3):>6} "
        f"{_number(row['seconds_denoise'], 3):>7} {_number(row.get('attention_cost'), 2):>5} "
        f"{_number(row.get('rival_psnr'), 1):>6} {beats:>4} {_percent(row.get('wins_from_attention_share')):>6} "
        f"{_percent(row.get('wins_from_attention_share_by_blocks')):>6} "
        f"{_number(None if state is None else state / 2**20, 1):>6}"
    ).rstrip()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
