import random
from itertools import product
from math import dist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order
from visparse.patterns import Disc


def expected(grid: Grid, radius: int) -> torch.Tensor:
    """Pair by pair: is the key less than a radius away in the plane? Frames do not count."""
    tokens = list(product(*map(range, grid)))
    return torch.tensor([[dist(q[1:], k[1:]) < radius for k in tokens] for q in tokens])


def test_a_seeded_sweep_also_through_blocks() -> None:
    draw = random.Random(3)
    for case in range(300):
        grid = (draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5, 7]), draw.choice([1, 3, 5, 7, 11]))
        pattern = Disc(radius=draw.randint(1, 9))
        at = Layout(grid).coordinates()
        mask = expected(grid, pattern.radius)
        assert torch.equal(pattern.keep(at, at, grid), mask), (grid, pattern)
        if case % 5 == 0:
            tile = tuple(draw.randint(1, length) for length in grid)
            order = draw.choice([Order(), Order(tile, tile), Order(None, tile), Order(tile, None)])  # type: ignore[arg-type]
            lists = compile_lists([pattern], Layout(grid), block_q=16, block_k=32, order=order)
            assert torch.equal(lists.to_mask()[0], mask), (grid, pattern, order)


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(1, 20))
def test_any_grid(grid: Grid, radius: int) -> None:
    at = Layout(grid).coordinates()
    assert torch.equal(Disc(radius=radius).keep(at, at, grid), expected(grid, radius))


def test_a_key_exactly_a_radius_away_is_not_seen() -> None:
    grid = (1, 11, 11)
    at = Layout(grid).coordinates()
    centre = torch.tensor([[0, 5, 5]])
    kept = Disc(radius=5).keep(centre, at, grid).view(11, 11)
    assert not kept[5, 0]  # 5 away
    assert not kept[2, 1]  # 3 up and 4 to the left
    assert kept[5, 1]
    assert kept[2, 2]
    assert Disc(radius=1).keep(centre, at, grid).nonzero()[:, 1].tolist() == [5 * 11 + 5]


def test_published_radii_on_a_picture_of_1024_pixels() -> None:
    """64 x 64 tokens. Points at most r away are 197, 797 and 3209 (Gauss); four of them are exactly r away."""
    grid = (1, 64, 64)
    at = Layout(grid).coordinates()
    for radius, points in ((8, 197), (16, 797), (32, 3209)):
        assert Disc(radius=radius).keep(torch.tensor([[0, 32, 32]]), at, grid).sum().item() == points - 4


def test_on_a_video_it_goes_through_all_frames() -> None:
    at = Layout((3, 5, 7)).coordinates()
    kept = Disc(radius=3).keep(at, at, (3, 5, 7)).view(3, 35, 3, 35)
    assert torch.equal(kept, kept[:1, :, :1].expand_as(kept))


def test_few_masks_are_evaluated() -> None:
    layout = Layout((4, 16, 32))
    pattern = Disc(radius=6)
    blocks = torch.arange(layout.visual).view(-1, 32)
    rows, cols = pattern.cover(blocks, blocks, layout.grid)[0].nonzero(as_tuple=True)
    assert len(pattern.alike(blocks, blocks, rows, cols, layout.grid).unique()) < len(rows) / 20


def test_on_another_grid() -> None:
    assert Disc(radius=16).rescale((1, 64, 64), (1, 128, 128)) == Disc(radius=32)
    assert Disc(radius=16).rescale((21, 30, 52), (5, 45, 80)) == Disc(radius=24)  # 16 * 1.519
    assert Disc(radius=3).rescale((1, 64, 64), (1, 2, 2)) == Disc(radius=1)
    assert Disc(radius=5).rescale((1, 64, 64), (9, 64, 64)) == Disc(radius=5)


@pytest.mark.parametrize(
    ("radius", "error", "text"),
    [
        (0, ValueError, "radius: wanted at least 1, got 0; with 1 a query sees only its own place"),
        (-8, ValueError, "radius: wanted at least 1, got -8"),
        (2.5, TypeError, "radius: wanted a whole number, got 2.5; round it"),
        (True, TypeError, "radius: wanted a whole number, got True"),
        ((1, 2, 3), TypeError, r"radius: wanted a whole number, got \(1, 2, 3\)"),
    ],
)
def test_bad_values(radius: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Disc(radius=radius)
