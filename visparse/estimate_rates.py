"""Rates: what a visited block costs on a device that was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RATES = Path(__file__).with_name("estimate_rates.json")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Cost of one implementation on one device, fitted to measured rows; `visparse.estimate_fit` makes it.

    Attributes:
        kind: short name of the device, ``"cpu"`` or such as ``"h200"``.
        device: full name of the device, with the number of threads of a CPU.
        impl: implementation of `visparse_kernels.attend`.
        head_dim: size of a head.
        dtype: of q, k and v.
        block_q, block_k: block sizes in slots.
        boxes: whether lists were compiled with ``boxes=True``.
        query_block_ns, full_ns, masked_ns: nanoseconds of the whole device for a query block, a full block and a masked
            block; ``masked_ns`` None where no masked block was measured.
        dense: the fastest dense attention that PyTorch has there.
        dense_pair_ns: its nanoseconds for a pair of tokens of one head.
        tokens: fewest and most tokens that were measured.
        rows: number of measured rows.
        worst: largest relative error of the fit on these rows, dense ones included.
        source: files and date of the measurement.
    """

    kind: str
    device: str
    impl: str
    head_dim: int
    dtype: str
    block_q: int
    block_k: int
    boxes: bool
    query_block_ns: float
    full_ns: float
    masked_ns: float | None
    dense: str
    dense_pair_ns: float
    tokens: tuple[int, int]
    rows: int
    worst: float
    source: str

    def milliseconds(self, query_blocks: float, full: float, masked: float) -> float:
        """Predict the time of one call; all counts are sums over heads and batch.

        Args:
            query_blocks: query blocks.
            full: visited blocks without a mask.
            masked: visited blocks with a mask; where none was measured they cost what full ones cost.
        """
        masked_ns = self.full_ns if self.masked_ns is None else self.masked_ns
        return (query_blocks * self.query_block_ns + full * self.full_ns + masked * masked_ns) / 1e6

    def dense_milliseconds(self, tokens: int, heads: int, batch: int) -> float:
        """Predict the time of dense attention."""
        return float(tokens) ** 2 * heads * batch * self.dense_pair_ns / 1e6


@cache
def all_rates() -> tuple[Rate, ...]:
    """Read the rates that ship with visparse; of one device and head size the fastest implementation comes first."""
    entries = json.loads(RATES.read_text())["rates"]
    return tuple(Rate(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in entries)


def rates_of(kind: str, head_dim: int) -> list[Rate]:
    """The rates of one device and head size, fastest implementation first; none where it was not measured."""
    return [rate for rate in all_rates() if (rate.kind, rate.head_dim) == (kind, head_dim)]
