"""Costs: milliseconds of one head of one layer under each candidate, from measured rates of a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from visparse.compensation.tiles import Tiles, tile_blocks, tiles_for
from visparse.compile import compile_lists
from visparse.estimate_rates import Rate, all_rates, rates_of
from visparse.explain_costs import PROXIES_SHARE
from visparse.head_search.candidates import Candidate, has_selector
from visparse.layout import Layout
from visparse.patterns import Dense, Pattern, Skip


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What candidates cost, for one head of one layer and one sequence.

    Attributes:
        device: short name of the device that the rates are of.
        source: where the rates come from, and what is doubtful about them.
        dense: milliseconds of dense attention, by PyTorch's fastest.
        milliseconds: of each candidate.
        block_density: visited blocks over all blocks, of each candidate.
        call: family -> milliseconds that a call of a layer takes besides what its heads take; 0 where it is missing.
    """

    device: str
    source: str
    dense: float
    milliseconds: tuple[float, ...]
    block_density: tuple[float, ...]
    call: Mapping[str, float] = field(default_factory=dict)


def make_costs(
    candidates: Sequence[Candidate],
    layout: Layout,
    head_dim: int,
    device: str,
    *,
    counted_on: torch.device | None = None,
    per_tile: int = 1,
    blocks: tuple[int, int] | None = None,
) -> Costs:
    """Look the candidates' costs up.

    Blocks are counted on the lists that would be used. Proxies take the share of dense attention that
    `visparse.explain_costs` gives them; adding a residual is not counted.

    Args:
        candidates: what heads may do.
        layout: grid and extra tokens.
        head_dim: size of a head.
        device: ``"cpu"``, a measured GPU such as ``"h200"``, or a device of this machine such as ``"cuda"``.
        counted_on: where blocks are counted; None: on the CPU.
        per_tile: proxies of each tile.
        blocks: tokens of a tile of queries and of keys, as `Proxies` has them.

    Raises:
        ValueError: nothing was measured on that device; the text names those that were.
    """
    rate, kind, doubt = _rate(device, head_dim)
    dense = rate.dense_milliseconds(layout.tokens, 1, 1)
    where = counted_on or torch.device("cpu")
    tiles = tiles_for(layout, *(blocks or tile_blocks(head_dim)), where, serpentine=has_selector(candidates))
    counts: list[tuple[float, float, float]] = []
    density: list[float] = []
    for one in candidates:
        if isinstance(one.pattern, Skip):
            found, visited = (0.0, 0.0, 0.0), 0.0
        elif one.family == "plain":
            found, visited = _listed(one.pattern, layout, rate, where)
        else:
            found, visited = _tiled(one.pattern, tiles, rate)
        counts.append(found)
        density.append(visited)
    times = [
        rate.milliseconds(*count)
        + (
            dense * PROXIES_SHARE * max(1.0, per_tile / 2)
            if one.family != "plain" and not isinstance(one.pattern, Dense)
            else 0.0
        )
        for one, count in zip(candidates, counts, strict=True)
    ]
    source = f"{rate.device}, {rate.impl}, {rate.dtype} ({rate.source}){doubt}"
    return Costs(device=kind, source=source, dense=dense, milliseconds=tuple(times), block_density=tuple(density))


def _rate(device: str, head_dim: int) -> tuple[Rate, str, str]:
    """The rate of the fastest implementation there; that of the nearest head size, scaled, where its own is unknown."""
    kind = device.lower()
    if kind.split(":")[0] == "cuda":
        name = torch.cuda.get_device_name(torch.device(kind)) if torch.cuda.is_available() else "no CUDA device"
        kind = next((rate.kind for rate in all_rates() if rate.device == name), name)
    known = sorted({rate.head_dim for rate in all_rates() if rate.kind == kind}, key=lambda size: abs(size - head_dim))
    if not known:
        kinds = ", ".join(sorted({rate.kind for rate in all_rates()}))
        raise ValueError(
            f"rates: no attention was measured on {kind!r} (measured: {kinds}); name a device that comes near, "
            f"such as rates='h200', or measure with `visparse bench kernels` and `visparse.estimate_fit`"
        )
    rate = rates_of(kind, known[0])[0]
    if known[0] == head_dim:
        return rate, kind, ""
    part = head_dim / known[0]
    changed = replace(
        rate,
        query_block_ns=rate.query_block_ns * part,
        full_ns=rate.full_ns * part,
        masked_ns=None if rate.masked_ns is None else rate.masked_ns * part,
        dense_pair_ns=rate.dense_pair_ns * part,
    )
    return changed, kind, f"; measured with heads of {known[0]}, scaled to {head_dim}"


def _listed(
    pattern: Pattern, layout: Layout, rate: Rate, where: torch.device
) -> tuple[tuple[float, float, float], float]:
    """Query blocks, full and masked blocks of a pattern's own lists, in blocks of the rate's size; block density."""
    lists = compile_lists([pattern], layout, block_q=rate.block_q, block_k=rate.block_k, boxes=rate.boxes, device=where)
    return (lists.n_q, len(lists.full_indices), len(lists.partial_indices)), lists.block_density


def _tiled(pattern: Pattern, tiles: Tiles, rate: Rate) -> tuple[tuple[float, float, float], float]:
    """The same for a pattern that is widened to tiles, all of them full, or for a selector, at most."""
    density = tiles.block_density(pattern)[1]
    rows = tiles.block_q / rate.block_q  # a tile is several blocks of the rate, or a part of one
    blocks = density * tiles.n_q * tiles.n_k
    return (tiles.n_q * rows, blocks * rows * tiles.block_k / rate.block_k, 0.0), density
