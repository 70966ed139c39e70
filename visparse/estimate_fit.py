"""Make `estimate_rates.json` of measured results: ``python -m visparse.estimate_fit RESULT.json ... --out FILE``.

A measured time is taken as ``query blocks * a + full blocks * b + masked blocks * c``, dense attention as
``pairs of tokens * d``. The numbers are fitted by least squares of the relative error, without negative ones.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visparse.bench.cases import find_case
from visparse.bench.patterns import grid_pattern
from visparse.compile import compile_lists
from visparse.estimate_rates import RATES, Rate
from visparse.layout import Layout
from visparse.measure.results import Record

_DENSE = ("sdpa_cudnn", "dense sdpa")
_IMPLS = ("gluon", "triton", "cpu")


class Measured(NamedTuple):
    """One measured row."""

    counts: tuple[float, float, float]  # query blocks, full blocks, masked blocks, of all heads and batches
    milliseconds: float
    row: Mapping[str, Any]


def fit_rates(paths: Sequence[Path]) -> list[Rate]:
    """Fit the rates of every device, head size and implementation that result files of kind ``kernels`` hold.

    Args:
        paths: result files.

    Returns:
        The rates; of one device and head size the one that passes a full block's pairs fastest comes first.

    Raises:
        ValueError: a file is no such record, or holds sparse rows without the dense one to compare with.
    """
    sparse: dict[tuple[str, str, int, str], list[Measured]] = defaultdict(list)
    dense: dict[tuple[str, str, int], list[tuple[float, float, str]]] = defaultdict(list)
    sources: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for path in paths:
        record = Record.read(path)
        if record.kind != "kernels":
            raise ValueError(f"{path}: wanted a record of kind 'kernels', got {record.kind!r}")
        kind, name = _device(record)
        for row in record.rows:
            if "milliseconds" not in row:
                continue
            sources[kind, row["head_dim"]][f"{path.name} of {record.date[:10]}"] = None
            if row["contender"] in _DENSE:
                pairs = float(row["tokens"]) ** 2 * row["heads"] * row.get("batch", 1)
                dense[kind, name, row["head_dim"]].append((pairs, row["milliseconds"], row["contender"]))
            elif row.get("impl") in _IMPLS and row["contender"].count(":") < 2:
                found = Measured(_counts(row, record.settings), row["milliseconds"], {**record.settings, **row})
                sparse[kind, name, row["head_dim"], row["impl"]].append(found)
    rates = []
    for (kind, name, head_dim, impl), rows in sparse.items():
        baseline = dense.get((kind, name, head_dim))
        if not baseline:
            raise ValueError(f"{kind}, head_dim {head_dim}: no dense row of {', '.join(_DENSE)}; measure one")
        rates.append(_rate(kind, name, head_dim, impl, rows, baseline, "; ".join(sources[kind, head_dim])))
    return sorted(rates, key=lambda rate: (rate.kind, rate.head_dim, rate.full_ns / (rate.block_q * rate.block_k)))


def _rate(
    kind: str,
    name: str,
    head_dim: int,
    impl: str,
    rows: Sequence[Measured],
    baseline: Sequence[tuple[float, float, str]],
    source: str,
) -> Rate:
    costs, worst = _fit([found.counts for found in rows], [found.milliseconds for found in rows])
    dense, dense_worst = _fit([(pairs,) for pairs, _, _ in baseline], [time for _, time, _ in baseline])
    tokens = [found.row["tokens"] for found in rows]
    first = rows[0].row
    return Rate(
        kind=kind,
        device=name,
        impl=impl,
        head_dim=head_dim,
        dtype=first["dtype"],
        block_q=first["block_q"],
        block_k=first["block_k"],
        boxes=impl == "gluon",
        query_block_ns=costs[0],
        full_ns=costs[1],
        masked_ns=costs[2] if any(found.counts[2] for found in rows) else None,
        dense=baseline[0][2],
        dense_pair_ns=dense[0],
        tokens=(min(tokens), max(tokens)),
        rows=len(rows) + len(baseline),
        worst=max(worst, dense_worst),
        source=source,
    )


def _counts(row: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[float, float, float]:
    """Count the blocks of a row; those of a pattern of the grid from its lists, which are compiled again."""
    block_q, block_k = (row.get(key, settings.get(key)) for key in ("block_q", "block_k"))
    heads = row["heads"] * row.get("batch", 1)
    case = find_case(row["case"]) if "case" in row else None
    pattern = grid_pattern(row["pattern"], case) if case is not None else None
    if case is not None and pattern is not None:
        layout = Layout(case.grid, case.before, case.after)
        lists = compile_lists([pattern], layout, block_q=block_q, block_k=block_k, boxes=bool(row.get("boxes")))
        return heads * lists.n_q, heads * len(lists.full_indices), heads * len(lists.partial_indices)
    query_blocks, key_blocks = -(-row["tokens"] // block_q), -(-row["tokens"] // block_k)
    visited = row["block_density"] * query_blocks * key_blocks * heads
    # random masks keep half of their block
    masked = visited * 2 * (1 - row["density"] / row["block_density"]) if "partial" in row.get("pattern", "") else 0.0
    return heads * query_blocks, visited - masked, masked


def _fit(counts: Sequence[Sequence[float]], milliseconds: Sequence[float]) -> tuple[list[float], float]:
    """Fit nanoseconds per count, none negative; returns them and the largest relative error."""
    wanted = torch.tensor(milliseconds, dtype=torch.float64) * 1e6
    table = torch.tensor(counts, dtype=torch.float64) / wanted[:, None]
    used = table.any(0)
    costs = torch.zeros(table.shape[1], dtype=torch.float64)
    while True:
        costs.zero_()
        ones = torch.ones(len(wanted), 1, dtype=torch.float64)
        costs[used] = torch.linalg.lstsq(table[:, used], ones, driver="gelsd").solution[:, 0]
        if bool((costs >= 0).all()):
            return costs.tolist(), float((table @ costs - 1).abs().max())
        used &= costs > 0


def _device(record: Record) -> tuple[str, str]:
    name = record.device["name"]
    if record.device["type"] == "cpu":
        return "cpu", f"{name}, {record.device['threads']} threads"
    return name.split()[-1].lower(), name


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and write the file."""
    parser = argparse.ArgumentParser(prog="python -m visparse.estimate_fit", description=str(__doc__).split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=RATES, metavar="FILE", help=f"default {RATES.name} of the package")
    arguments = parser.parse_args(argv)
    rates = fit_rates(arguments.results)
    arguments.out.write_text(json.dumps({"schema": 1, "rates": [_rounded(rate) for rate in rates]}, indent=1) + "\n")
    for rate in rates:
        print(f"{rate.kind} {rate.impl} head_dim {rate.head_dim}: {rate.rows} rows, worst {rate.worst:.1%}")


def _rounded(rate: Rate) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in asdict(rate).items()}


if __name__ == "__main__":
    main()
