"""Distinct rows of large tables, by their hash."""

import torch
from torch import Tensor

_SCRATCH = 1 << 20  # elements; on a CPU more than that leaves its cache


def scratch(device: torch.device) -> int:
    """Return how many elements of scratch one step may use: more on an accelerator, where a step has a fixed cost."""
    return _SCRATCH if device.type == "cpu" else _SCRATCH << 4


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the distinct rows.

    Args:
        rows: int32 or int64 [n, ...].

    Returns:
        ``distinct`` [m, ...] and ``index`` int64 [n] with ``distinct[index] == rows``.
    """
    flat = rows.flatten(1)
    first, index = first_of(_hash(flat))
    if not torch.equal(flat[first][index], flat):  # two rows with one hash: compare them number by number instead
        distinct, index = torch.unique(flat, dim=0, return_inverse=True)
        return distinct.view(-1, *rows.shape[1:]), index
    return rows[first], index


def first_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first place of every distinct key.

    Args:
        keys: int64 [n].

    Returns:
        ``first`` int64 [m], ascending, and ``index`` int64 [n] with ``keys[first][index] == keys``.
    """
    distinct, index = torch.unique(keys, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(distinct, len(keys)).scatter_reduce_(0, index, places, "amin")
    first, by_place = first.sort()
    return first, by_place.argsort()[index]


def _hash(flat: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator).to(flat.device)
    parts = [(part * weights).sum(1) for part in flat.split(max(1, scratch(flat.device) // max(1, flat.shape[1])))]
    return torch.cat(parts)
