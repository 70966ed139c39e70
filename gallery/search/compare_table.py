"""The result as a table in text, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = (
    f"{'row':52} {'blocks':>6} {'step':>6} {'pred.':>6} {'off':>6} {'run':>6} {'PSNR':>6} {'SSIM':>6} {'latent':>6} "
    f"{'rival':>6}"
)
_LEGEND = """\
step: measured time of attention in a sparse step over that of a dense one; pred.: what the costs say; off: predicted
minus measured time of a sparse step, over the measured one. run: attention of the whole run, dense run = 1. rival: PSNR
of dense with fewer steps in equal time."""


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each target: PSNR of searched plans above the best of the others, in dB.

    Args:
        rows: of the record.

    Returns:
        `target`; `searched`: label, PSNR and measured share of the best searched plan; `above`: for each kind of
        contender its best row, the difference `by`, `time`: measured time of a sparse step over that row's, and `run`:
        attention of the whole run over that row's (None where it was not measured, and for a contender that was not
        run); `plain_above_single`: the same for the searched plan without compensation.
    """
    found = []
    for target in sorted({row["target"] for row in rows if row["plan"] == "sparse" and row["target"]}, reverse=True):
        own = [row for row in rows if row["plan"] == "sparse" and row["target"] == target]
        searched = _best(own, "searched")
        if searched is None:
            continue
        above: dict[str, Any] = {}
        for kind in ("single", "compensated", "published"):
            other = _best(own, kind)
            above[kind] = None if other is None else _short(other) | _lead(searched, other)
        plain = _best([row for row in own if row["what"] == "plain"], "searched")
        single = _best(own, "single")
        found.append(
            {
                "target": target,
                "searched": _short(searched),
                "above": above,
                "plain_above_single": None if plain is None or single is None else _lead(plain, single),
            }
        )
    return found


def table(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Dense runs, the others by target and PSNR, and the differences.

    Args:
        rows: of the record.
        settings: of the record.
    """
    first = [row for row in rows if row["plan"] not in ("sparse", "elsewhere")]
    sparse = sorted(
        (row for row in rows if row["plan"] == "sparse"), key=lambda row: (-(row["target"] or 0.0), -row["psnr"])
    )
    lines = [_HEAD, *map(_line, first)]
    last: object = ()
    for row in sparse:
        lines += [""] if row["target"] != last else []
        last = row["target"]
        lines.append(_line(row))
    elsewhere = [row for row in rows if row["plan"] == "elsewhere"]
    lines += ["", *map(_line, elsewhere)] if elsewhere else []
    lines += ["", _LEGEND]
    for one in verdicts(rows):
        others = [
            f"{kind} {value['by']:+.2f} dB in {_times(value)} ({value['label']})"
            for kind, value in one["above"].items()
            if value is not None
        ]
        lines.append(f"at {one['target']:.1%}: {one['searched']['label']}: {'; '.join(others) or 'no other row'}")
        plain = one["plain_above_single"]
        if plain is not None:
            lines.append(f"  searched, plain, above the best single: {plain['by']:+.2f} dB in {_times(plain)}")
    if settings.get("search"):
        seconds = settings["search"]["seconds"]
        lines.append(f"search: {', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())}")
    if settings.get("not_run"):
        lines.append(f"not run ({len(settings['not_run'])}): {'; '.join(settings['not_run'])}")
    for name, text in (("no_size", "no size fits"), ("not_tried", "not tried")):
        kinds = [f"{one['kind']} @ {one['target']:.1%}" for one in settings.get(name, [])]
        lines += [f"{text} ({len(kinds)}): {'; '.join(kinds)}"] if kinds else []
    lines += [f"failed: {text}" for text in settings.get("failed", [])]
    return "\n".join(lines)


def _best(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    return max((row for row in rows if row["kind"] == kind), key=lambda row: row["psnr"], default=None)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("label", "psnr", "measured_share")}


def _lead(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        "by": row["psnr"] - other["psnr"],
        "time": _ratio(row.get("measured_share"), other.get("measured_share")),
        "run": _ratio(row.get("attention_cost"), other.get("attention_cost")),
    }


def _ratio(mine: float | None, other: float | None) -> float | None:
    return None if mine is None or other is None else mine / other


def _times(lead: Mapping[str, Any]) -> str:
    parts = {"time of a sparse step": lead["time"], "attention of a run": lead["run"]}
    known = [f"{value:.2f} of its {name}" for name, value in parts.items() if value is not None]
    return ", ".join(known) or "unknown time"


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['label'][:52]:52} {_percent(row.get('block_density')):>6} {_percent(row.get('measured_share')):>6} "
        f"{_percent(row.get('predicted_share')):>6} {_signed(row.get('prediction_off')):>6} "
        f"{_percent(row.get('attention_cost')):>6} {_number(row.get('psnr'), 2):>6} {_number(row.get('ssim'), 3):>6} "
        f"{_number(row.get('latent_error'), 3):>6} {_number(row.get('rival_psnr'), 1):>6}"
    ).rstrip()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.0%}"
