"""Patterns that are benchmarked, by name: block lists of a case at any block size."""

from __future__ import annotations

import torch

from visparse import compile as compiler
from visparse.bench.cases import PATTERNS, Case
from visparse.bench.random_blocks import Mix, random_blocks
from visparse.errors import nearest
from visparse.layout import Layout
from visparse.patterns import Neighborhood, Pattern, Radial
from visparse_kernels import BlockLists

_SHARES = {"50": 0.5, "25": 0.25, "12": 0.125, "6": 0.0625}
_MASKED = 0.2


def check_pattern(name: str) -> str:
    """Return the name of a pattern.

    Raises:
        ValueError: there is none of that name; names the nearest.
    """
    if name not in PATTERNS:
        raise ValueError(f"pattern: wanted one of {', '.join(PATTERNS)}, got {name!r}{nearest(name, PATTERNS)}")
    return name


def obstacle(name: str, case: Case) -> str | None:
    """Why a case has not this pattern; None where it has."""
    if name.startswith("gna") and case.window is None:
        return "a plain sequence has no window"
    if name == "sta" and case.tile is None:
        return "no tile is set that divides the grid"
    if name.startswith("radial") and case.grid[0] == 1:
        return "one frame has no radial decay"
    return None


def grid_pattern(name: str, case: Case) -> Pattern | None:
    """The pattern of a name on the grid of a case; None for those that are made of blocks, not of places.

    `sta` is sliding tile attention written as a neighbourhood whose stride is one tile and whose window is a whole
    number of tiles: the same mask where tiles divide the grid (arXiv 2502.04507; arXiv 2504.16922, section 3).
    """
    if name == "radial":
        return Radial()
    if name == "radial_code":
        return Radial(variant="code", decay=0.2)
    if name == "gna" and case.window is not None:
        return Neighborhood(window=case.window)
    if name == "gna_strided" and case.window is not None and case.stride is not None:
        return Neighborhood(window=case.window, stride=case.stride)
    if name == "sta" and case.tile is not None and case.tiles is not None:
        a, b, c = (size * count for size, count in zip(case.tile, case.tiles, strict=True))
        return Neighborhood(window=(a, b, c), stride=case.tile)
    return None


def describe(name: str, case: Case, grain: tuple[int, int]) -> str:
    """One line that says what is kept; `grain` is the size in which random blocks are drawn."""
    pattern = grid_pattern(name, case)
    if isinstance(pattern, Neighborhood):
        text = f"window {_by(pattern.window)}, stride {_by(pattern.stride)} of {_by(case.grid)}"
        return f"{text} (tiles of {_by(case.tile)})" if name == "sta" else text
    if isinstance(pattern, Radial):
        return f"Radial variant {pattern.variant!r}, decay {pattern.decay}"
    if name == "dense":
        return "every block"
    kind, percent = name.split("_")
    text = f"{_SHARES[percent]:.2%} of the blocks of {_by(grain)} of each row, drawn for every head"
    text += ", row lengths uniform from 1 to twice that" if kind == "uneven" else ""
    return text + (f", {_MASKED:.0%} of them with a random bit mask" if kind == "partial" else "")


def build_lists(
    name: str,
    case: Case,
    *,
    block_q: int,
    block_k: int,
    boxes: bool,
    grain: tuple[int, int],
    device: torch.device | str,
) -> BlockLists:
    """Block lists of a pattern on a case, compiled anew; the kept pairs do not depend on the block sizes.

    Args:
        name: one of `cases.PATTERNS`.
        case: the shape.
        block_q: query slots per block.
        block_k: key slots per block.
        boxes: whether blocks of patterns on a grid are boxes of it.
        grain: sizes in which random blocks are drawn, multiples of the block sizes.
        device: where the lists are built and live.

    Raises:
        ValueError: the case has not this pattern, or the block sizes do not divide the grain.
    """
    reason = obstacle(name, case)
    if reason is not None:
        raise ValueError(f"pattern: {name} is not for case {case.name}: {reason}")
    if name == "dense":
        return BlockLists.dense(
            q_len=case.tokens, k_len=case.tokens, heads=case.heads, block_q=block_q, block_k=block_k, device=device
        )
    pattern = grid_pattern(name, case)
    if pattern is None:
        kind, percent = name.split("_")
        mix = Mix(share=_SHARES[percent], masked=_MASKED if kind == "partial" else 0.0, uneven=kind == "uneven")
        return random_blocks(case.tokens, case.heads, mix, block_q=block_q, block_k=block_k, grain=grain, device=device)
    layout = Layout(case.grid, before=case.before, after=case.after)
    heads = [pattern] * case.heads
    compiler.clear_cache()
    return compiler.compile_lists(heads, layout, block_q=block_q, block_k=block_k, boxes=boxes, device=device)


def _by(sizes: object) -> str:
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)
