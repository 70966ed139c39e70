"""Shapes that are benchmarked, as data: tokens, heads and windows of real models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from visparse.errors import nearest

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of self-attention.

    Args:
        name: as on the command line.
        grid: (frames, height, width), in tokens; a plain sequence is (1, 1, tokens).
        heads: number of heads.
        head_dim: size of a head.
        batch: number of sequences.
        before: extra tokens in front of the grid.
        after: extra tokens behind it.
        window: of the neighbourhood patterns, in tokens; None where the case has none.
        stride: of the strided neighbourhood.
        tile: of sliding tile attention, in tokens; None where no tile divides the grid.
        tiles: its window, in tiles.
        patterns: what is measured unless patterns are named.
        compiled: patterns on which peers that compile anew for each problem take part unasked; it takes them long.
    """

    name: str
    grid: Triple
    heads: int
    head_dim: int
    batch: int = 1
    before: int = 0
    after: int = 0
    window: Triple | None = None
    stride: Triple | None = None
    tile: Triple | None = None
    tiles: Triple | None = None
    patterns: tuple[str, ...]
    compiled: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens of one sequence."""
        return prod(self.grid) + self.before + self.after

    @property
    def dense_flops(self) -> float:
        """Work of dense attention: two matrix products of 2 * tokens^2 * head_dim for each head."""
        return 4.0 * self.tokens**2 * self.head_dim * self.heads * self.batch


SWEEP = ("dense", "random_50", "random_25", "random_12", "random_6", "partial_12", "uneven_12")
VIDEO = ("dense", "random_12", "radial_code", "gna_strided", "gna", "sta")
COMPILED = ("dense", "random_12", "partial_12", "gna_strided", "gna")
PICTURE = ("dense", "random_12", "gna_strided", "gna")

# in order of importance: when the time is over, the rest is not run
CASES = (
    Case(name="s32768", grid=(1, 1, 32768), heads=24, head_dim=128, patterns=SWEEP, compiled=COMPILED),
    Case(name="s16384_d64", grid=(1, 1, 16384), heads=24, head_dim=64, patterns=SWEEP, compiled=COMPILED),
    Case(
        name="hunyuan_sta",
        grid=(30, 48, 80),
        heads=24,
        head_dim=128,
        window=(18, 24, 24),
        stride=(16, 8, 8),
        tile=(6, 8, 8),
        tiles=(3, 3, 3),
        patterns=("dense", "gna_strided", "gna", "sta"),
        compiled=COMPILED,
    ),
    Case(
        name="wan14b_720p",
        grid=(21, 45, 80),
        heads=40,
        head_dim=128,
        window=(12, 24, 32),
        stride=(4, 8, 8),
        tile=(3, 9, 8),
        tiles=(3, 3, 3),
        patterns=("dense", "random_25", "radial_code", "gna_strided", "gna", "sta", "radial"),
    ),
    Case(
        name="wan1.3b_480p",
        grid=(21, 30, 52),
        heads=12,
        head_dim=128,
        window=(12, 16, 16),
        stride=(4, 8, 8),
        patterns=VIDEO[:-1],
    ),
    Case(
        name="cogvideox_5b",
        grid=(13, 30, 45),
        heads=48,
        head_dim=64,
        before=226,
        window=(8, 16, 16),
        stride=(4, 8, 8),
        patterns=VIDEO[:-1],
    ),
    Case(
        name="flux_2k",
        grid=(1, 128, 128),
        heads=24,
        head_dim=128,
        before=512,
        window=(1, 40, 40),
        stride=(1, 8, 8),
        patterns=PICTURE,
    ),
    Case(
        name="hunyuan_720p",
        grid=(33, 45, 80),
        heads=24,
        head_dim=128,
        after=256,
        window=(18, 24, 24),
        stride=(16, 8, 8),
        tile=(3, 9, 8),
        tiles=(5, 3, 3),
        patterns=VIDEO,
    ),
    Case(
        name="wan14b_480p",
        grid=(21, 30, 52),
        heads=40,
        head_dim=128,
        window=(12, 16, 16),
        stride=(4, 8, 8),
        patterns=VIDEO[:-1],
    ),
    Case(
        name="flux_4k",
        grid=(1, 256, 256),
        heads=24,
        head_dim=128,
        before=512,
        window=(1, 80, 80),
        stride=(1, 16, 16),
        patterns=PICTURE,
    ),
    Case(
        name="flux_1k",
        grid=(1, 64, 64),
        heads=24,
        head_dim=128,
        before=512,
        window=(1, 24, 24),
        stride=(1, 8, 8),
        patterns=PICTURE,
    ),
    Case(
        name="vit_l_1024",
        grid=(1, 64, 64),
        heads=16,
        head_dim=64,
        batch=8,
        before=5,
        window=(1, 24, 24),
        stride=(1, 8, 8),
        patterns=PICTURE,
    ),
    Case(
        name="vit_l_2048",
        grid=(1, 128, 128),
        heads=16,
        head_dim=64,
        before=5,
        window=(1, 40, 40),
        stride=(1, 8, 8),
        patterns=PICTURE,
    ),
    Case(
        name="demo",
        grid=(9, 32, 32),
        heads=4,
        head_dim=64,
        window=(5, 16, 16),
        stride=(1, 8, 8),
        tile=(3, 8, 8),
        tiles=(1, 3, 3),
        patterns=("dense", "random_50", "random_25", "random_12", "random_6", "gna_strided", "gna"),
    ),
    Case(
        name="tiny",
        grid=(4, 16, 16),
        heads=2,
        head_dim=32,
        window=(2, 8, 8),
        stride=(2, 4, 4),
        tile=(2, 4, 4),
        tiles=(1, 3, 3),
        patterns=("dense", "random_25", "partial_25", "gna"),
    ),
)

PATTERNS = (
    "dense",
    *(f"{kind}_{percent}" for kind in ("random", "partial", "uneven") for percent in (50, 25, 12, 6)),
    "radial",
    "radial_code",
    "gna",
    "gna_strided",
    "sta",
)

DEFAULT = {
    "cuda": tuple(case.name for case in CASES if case.name not in ("demo", "tiny")),
    "cpu": ("demo",),
}
QUICK = {"cuda": ("s32768", "s16384_d64"), "cpu": ("tiny",)}


def find_case(name: str) -> Case:
    """The case of a name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    for case in CASES:
        if case.name == name:
            return case
    names = [case.name for case in CASES]
    raise ValueError(f"case: wanted one of {', '.join(names)}, got {name!r}{nearest(name, names)}")
