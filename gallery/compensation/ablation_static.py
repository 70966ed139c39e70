"""Static patterns of a given block density: which candidates there are, how dense they really are, and the best one.

Two families. *Neighborhood*: one window, whatever the frame. *Decay*: windows that get smaller with the distance in
frames, which is what Radial Attention does; the published rule itself keeps near frames whole, so on 9 frames it keeps
55 % at least and cannot be had at these densities.

A candidate is as dense as the blocks that it visits: those of its own masks, or, with proxies, the whole tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from visparse.compensation.tiles import tile_blocks, tiles_for
from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import Neighborhood, Pattern, Union
from visparse_kernels import preferred_blocks, prefers_boxes

FAMILIES = ("neighborhood", "decay")
HEAD_DIM = 64
Blocks = tuple[int, int] | None
_SHARES = (2, 3, 4, 6, 8)  # of a side, in eighths
_LEAST, _MOST = 0.75, 1.1  # of the density that is wanted
_TRIES = 24  # of each kind, where lists are compiled, which takes its time


@dataclass(frozen=True)
class Candidate:
    """A pattern, how many of the blocks it visits on a grid, and roughly how many of the pairs it keeps."""

    pattern: Pattern
    density: float
    kept: float


def candidates(
    family: str, grid: Grid, target: float, *, tiled: bool, device: torch.device, blocks: Blocks = None
) -> list[Candidate]:
    """Patterns of about a block density: of each kind the one that keeps the most pairs for its blocks.

    Args:
        family: one of `FAMILIES`.
        grid: (frames, height, width), in tokens.
        target: block density that is wanted.
        tiled: whether whole tiles are seen, as with proxies.
        device: whose block sizes count.
        blocks: tokens of a block of queries and of keys; None: what the device likes.

    Returns:
        At most one for each number of frames (neighborhood) or size of the widest window (decay), by the pairs that
        they keep, most first; the single nearest one where none visits between 75 % and 110 % of the target.
    """
    kinds: dict[object, list[tuple[float, Pattern]]] = {}
    for kind, pattern, kept in _all(family, grid):
        if 0.2 * target <= kept <= _MOST * target:
            kinds.setdefault(kind, []).append((kept, pattern))
    found, tried = [], []
    for entries in kinds.values():
        for kept, pattern in sorted(entries, key=lambda entry: -entry[0])[: None if tiled else _TRIES]:
            tried.append(
                Candidate(pattern, block_density(pattern, grid, tiled=tiled, device=device, blocks=blocks), kept)
            )
            if _LEAST * target <= tried[-1].density <= _MOST * target:
                found.append(tried[-1])
                break
    if not tried:
        raise ValueError(f"target: no {family} pattern keeps about {target} of grid {grid}; want more")
    return sorted(found, key=lambda one: -one.kept) or [min(tried, key=lambda one: abs(one.density - target))]


def block_density(pattern: Pattern, grid: Grid, *, tiled: bool, device: torch.device, blocks: Blocks = None) -> float:
    """Visited blocks over all blocks: of the pattern's own masks, or of whole tiles."""
    layout = Layout(grid)
    if tiled:
        return float(tiles_for(layout, *(blocks or tile_blocks(HEAD_DIM)), device).widen(pattern).float().mean())
    block_q, block_k = blocks or preferred_blocks(device, HEAD_DIM)
    boxes = blocks is None and prefers_boxes(device, HEAD_DIM)
    return compile_lists((pattern,), layout, block_q=block_q, block_k=block_k, boxes=boxes, device=device).block_density


def best(found: Sequence[Candidate], judge: Callable[[Pattern], float], limit: int) -> tuple[Candidate, list[float]]:
    """The candidate of the highest PSNR on the calibration clips, and the PSNR of each; the first where limit is 1."""
    tried = list(found[:limit])
    if len(tried) == 1:
        return tried[0], []
    values = [judge(one.pattern) for one in tried]
    return tried[values.index(max(values))], values


def _all(family: str, grid: Grid) -> Iterator[tuple[object, Pattern, float]]:
    """Every pattern of a family, its kind, and the share of pairs that it keeps, roughly."""
    frames, height, width = grid
    reach = sorted({1, frames // 3 | 1, frames // 2 | 1, frames})
    strides = [
        (t, height // n, width // m) for t in (1, frames // 3) for n, m in ((height, width), (8, 8), (4, 4), (4, 2))
    ]
    if family == "neighborhood":
        for t, h, w, stride in product(reach, _SHARES, _SHARES, strides):
            window = (t, height * h // 8, width * w // 8)
            if max(h, w) <= 2 * min(h, w) and _at_most(stride, window):
                yield t, Neighborhood(window=window, stride=stride), t * h * w / (64 * frames)
        return
    inner, outer = reach[1], reach[2]
    aspects = product((1, 2), (1, 2))  # of the inner window, of the others
    for near, middle, far, (wide, others), stride in product(_SHARES, _SHARES, (0, *_SHARES), aspects, strides):
        if not near > middle >= far or near * wide < middle * others:
            continue
        rings = [(inner, near, wide), (outer, middle, others), (frames, far, others)][: 3 if far else 2]
        boxes = [(t, height * side // 8, width * min(8, side * aspect) // 8) for t, side, aspect in rings]
        if all(_at_most(stride, box) for box in boxes):
            parts = [inner, outer - inner, frames - outer]
            pairs = sum(part * box[1] * box[2] for part, box in zip(parts, boxes, strict=False))
            windows = tuple(Neighborhood(window=box, stride=stride) for box in boxes)
            yield near, Union(patterns=windows), pairs / (frames * height * width)


def _at_most(stride: Sequence[int], window: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(stride, window, strict=True))
