"""Single patterns: every pattern of the library in many sizes, and which size costs as much as is wanted."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch

from visparse.head_search.candidates import Candidate
from visparse.head_search.costs import make_costs
from visparse.layout import Grid, Layout
from visparse.patterns import (
    Band,
    Diagonal,
    Disc,
    FirstFrame,
    Halo,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    PowerOfTwo,
    Radial,
    ShiftedWindow,
    SlidingTile,
    SpatialHead,
    Strided,
    Stripe,
    TemporalHead,
    TopK,
    Union,
    Window,
)

UNIFORM = "top-k mass_variance"
_FARTHER = 3


@dataclass
class Ladder:
    """One kind of pattern in many sizes, the smallest first.

    Args:
        kind: its name in the table.
        rungs: the sizes.
        family: of the search's costs: "plain" or "foveal" (whole tiles, proxies and residual).
        grid: (frames, height, width), in tokens.
        head_dim: size of a head.
        device: whose measured rates count.
        costs: place -> predicted time over that of dense attention, by rates alone, as far as it was asked for.
        counted_on: where blocks are counted; None: on the CPU.
    """

    kind: str
    rungs: Sequence[Pattern]
    family: str
    grid: Grid
    head_dim: int
    device: str
    costs: dict[int, float] = field(default_factory=dict)
    counted_on: torch.device | None = None

    def cost(self, place: int) -> float:
        """Predicted share of dense attention's time."""
        if place not in self.costs:
            one = Candidate("x", self.family, self.rungs[place])
            found = make_costs([one], Layout(self.grid), self.head_dim, self.device, counted_on=self.counted_on)
            self.costs[place] = found.milliseconds[0] / found.dense
        return self.costs[place]

    def below(self, share: float) -> tuple[Pattern, float] | None:
        """The size that costs most within a share of dense attention, and its cost; None where there is none.

        Costs rise with the sizes, but for steps of whole blocks: some larger sizes are looked at too.
        """
        low, high = -1, len(self.rungs)
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(middle) <= share:
                low = middle
            else:
                high = middle
        for place in range(high + 1, min(high + 1 + _FARTHER, len(self.rungs))):
            self.cost(place)
        return self.known_below(share)

    def known_below(self, share: float) -> tuple[Pattern, float] | None:
        """The same among the sizes whose cost was looked up."""
        fitting = [(cost, place) for place, cost in self.costs.items() if cost <= share]
        return (self.rungs[max(fitting)[1]], max(fitting)[0]) if fitting else None


def fill(ladders: Sequence[Ladder], shares: Sequence[float], workers: int) -> Callable[[], list[Ladder]]:
    """Begin to look up the costs of the sizes that some shares need.

    Args:
        ladders: of any kinds.
        shares: of dense attention's time.
        workers: processes; 0: none, all is looked up when it is asked for.

    Returns:
        A function that waits, and returns the ladders with their costs.
    """
    if workers == 0:
        return lambda: list(ladders)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    begun = [pool.submit(_fill, ladder, tuple(shares)) for ladder in ladders]
    pool.shutdown(wait=False)
    return lambda: [one.result() for one in begun]


def _fill(ladder: Ladder, shares: Sequence[float]) -> Ladder:
    torch.set_num_threads(1)
    for share in shares:
        ladder.below(share)
    return ladder


def all_kinds(grid: Grid) -> dict[str, list[Pattern]]:
    """Every pattern of the library by kind, in rising sizes; sizes that do not fit the grid are left out.

    Left out are skip and dense, and `PerHead`, `Union` and `Intersection`, which are made of others, but for two usual
    unions: windows that shrink with the distance in frames, and a tube with the first frame.

    Args:
        grid: (frames, height, width), in tokens.
    """
    frames, height, width = grid
    area, tokens = height * width, frames * height * width
    sides, squares = _sides(height, width, 2.0), _sides(height, width, 1.2)
    middle, near = frames // 2 | 1, frames // 3 | 1
    every = max(64, min(1024, area))
    stride = max(1, height // 8), max(1, width // 8)
    parts = [2 ** (n / 3) / 128 for n in range(22)]  # 0.8 % to all but one
    kinds: dict[str, list[Callable[[], Pattern]]] = {
        "tube": [lambda s=s: _near(frames, s, stride) for s in sides],
        "window of half the frames": [lambda s=s: _near(middle, s, stride) for s in sides],
        "window of a third of the frames": [lambda s=s: _near(near, s, stride) for s in sides],
        "own frame": [lambda s=s: _near(1, s, stride) for s in sides],
        "whole frames": [lambda n=n: _near(n, (height, width), stride) for n in range(1, frames + 1, 2)],
        "rows": [lambda s=s: _near(frames, (s[0], width), stride) for s in squares],
        "columns": [lambda s=s: _near(frames, (height, s[1]), stride) for s in squares],
        "decay": [lambda s=s: _decay(grid, s, stride) for s in squares],
        "first frame": [lambda n=n: FirstFrame(frames=n) for n in range(1, frames + 1)],
        "tube and first frame": [
            lambda s=s: Union(patterns=(_near(frames, s, stride), FirstFrame())) for s in squares if frames > 1
        ],
        "sliding tile": [
            lambda n=n, t=t: SlidingTile(tile=_at_most((2, 8, 8), grid), window=(t, n, n))
            for n in (1, 3, 5, 7)
            for t in (1, 3, 5, 7)
            if t <= -(-frames // 2) | 1
        ],
        "window": [lambda s=s: Window(window=(frames, *s)) for s in sides],
        "shifted window": [lambda s=s: ShiftedWindow(window=(frames, *s)) for s in sides],
        "halo": [
            lambda n=n: Halo(block=_at_most((frames, 8, 8), grid), halo=(0, n, n)) for n in range(min(height, width))
        ],
        "disc": [lambda n=n: Disc(radius=n) for n in range(1, max(height, width))],
        "band": [lambda p=p: Band(share=p) for p in parts],
        "band of places": [lambda p=p: Band(share=p, per_frame=True) for p in parts],
        "diagonal": [lambda p=p: Diagonal(width=max(1, round(p * tokens))) for p in parts],
        "multi-diagonal": [lambda p=p: MultiDiagonal(width=max(1, round(p * tokens))) for p in parts],
        "spatial head": [lambda p=p: SpatialHead(width=round(p * frames, 3)) for p in parts],
        "temporal head": [lambda p=p: TemporalHead(width=round(p * frames, 3)) for p in parts],
        "stripes": [lambda n=n: Stripe(every=every, width=32 * n) for n in range(1, every // 32)],
        "strided": [lambda n=n: Strided(stride=n) for n in (64, 48, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2)],
        "powers of two": [
            lambda n=n: PowerOfTwo(block=min(256, max(1, area // 4)), window=n) for n in range(1, tokens // 256 + 2)
        ],
        "radial": [
            *(lambda d=d: Radial(variant="code", decay=d) for d in (0.05, 0.1, 0.2, 0.4, 0.8)),
            lambda: Radial(),
        ],
    }
    return {kind: fitting for kind, made in kinds.items() if (fitting := _fitting(made, grid))}


def uniform(refresh: float | int | None) -> list[Pattern]:
    """Tiles chosen by content, the same share for every head."""
    return [TopK(share=n / 400, score="mass_variance", refresh=refresh) for n in range(1, 361)]


def _fitting(made: Sequence[Callable[[], Pattern]], grid: Grid) -> list[Pattern]:
    token = torch.zeros(1, 3, dtype=torch.int64)
    fitting: list[Pattern] = []
    for make in made:
        try:
            pattern = make()
            pattern.pairs(token, token, grid)
        except ValueError:  # too large or too small for the grid, as its own check says
            continue
        if pattern not in fitting:
            fitting.append(pattern)
    return fitting


def _sides(height: int, width: int, ratio: float) -> list[tuple[int, int]]:
    """Heights and widths of windows in sixteenths of the frame, by area, at most so many times wider than high."""
    places = [(a, b) for a in range(1, 17) for b in range(a, 17) if b <= ratio * a]
    places.sort(key=lambda one: (one[0] * one[1], one[1]))
    return list(dict.fromkeys((max(1, height * a // 16), max(1, width * b // 16)) for a, b in places))


def _near(frames: int, side: tuple[int, int], stride: tuple[int, int]) -> Neighborhood:
    return Neighborhood(window=(frames, *side), stride=(1, min(side[0], stride[0]), min(side[1], stride[1])))


def _decay(grid: Grid, side: tuple[int, int], stride: tuple[int, int]) -> Union:
    """Windows of half and a quarter of the side in frames that are farther away."""
    frames = grid[0]
    reach = (frames // 3 | 1, frames // 2 | 1, frames)
    rings = [(t, max(1, side[0] >> n), max(1, side[1] >> n)) for n, t in enumerate(reach)]
    return Union(patterns=tuple(_near(t, (h, w), stride) for t, h, w in rings))


def _at_most(lengths: tuple[int, int, int], grid: Grid) -> tuple[int, int, int]:
    return min(lengths[0], grid[0]), min(lengths[1], grid[1]), min(lengths[2], grid[2])
