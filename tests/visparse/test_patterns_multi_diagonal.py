import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import MultiDiagonal, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def reordered(grid: Grid) -> list[Token]:
    """The tokens, those of one place in all frames next to each other."""
    tokens = []
    for row in range(grid[1]):
        for column in range(grid[2]):
            for frame in range(grid[0]):
                tokens.append((frame, row, column))
    return tokens


def window(grid: Grid, width: int) -> dict[Token, set[Token]]:
    """The keys of each query: itself and width // 2 tokens on either side of it in that order."""
    tokens = reordered(grid)
    side = width // 2
    return {token: set(tokens[max(0, at - side) : at + side + 1]) for at, token in enumerate(tokens)}


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        width = random.randint(1, len(reordered(grid)))
        keys = window(grid, width)
        check_pattern(MultiDiagonal(width=width), grid, keys, compiled=case % 3 == 0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.data())
def test_odd_ones(grid: Grid, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(reordered(grid))))
    keys = window(grid, width)
    check_pattern(MultiDiagonal(width=width), grid, keys)


def test_the_own_place_in_all_frames() -> None:
    grid = (4, 2, 3)
    at = Layout(grid).coordinates()
    kept = MultiDiagonal(width=7).keep(at, at, grid).view(4, 6, 4, 6)
    for place in range(6):
        assert kept[:, place, :, place].all()
    assert not MultiDiagonal(width=5).keep(at, at, grid).view(4, 6, 4, 6)[0, 0, 3, 0]


def test_one_frame_is_the_diagonal() -> None:
    at = Layout((1, 1, 9)).coordinates()
    kept = MultiDiagonal(width=3).keep(at, at, (1, 1, 9))
    assert kept.nonzero().tolist() == [[i, j] for i in range(9) for j in range(9) if j in (i - 1, i, i + 1)]


def test_flex_attention_agrees() -> None:
    check_flex(MultiDiagonal(width=11), Layout((3, 5, 7), before=3, after=2))


@pytest.mark.parametrize(
    ("source", "target", "width", "wanted"),
    [
        ((21, 30, 52), (21, 45, 80), 2000, 4615),
        ((21, 45, 80), (41, 45, 80), 41, 80),
        ((21, 45, 80), (21, 80, 45), 41, 41),
        ((21, 45, 80), (1, 45, 80), 41, 2),
        ((21, 45, 80), (1, 1, 9), 41, 1),
    ],
)
def test_rescale(source: Grid, target: Grid, width: int, wanted: int) -> None:
    assert MultiDiagonal(width=width).rescale(source, target) == MultiDiagonal(width=wanted)


@pytest.mark.parametrize(
    ("width", "error", "text"),
    [
        (0, ValueError, "width: wanted at least 1, got 0; count it in tokens of the pixel-major sequence"),
        ("3", TypeError, "width: wanted a whole number, got str '3'"),
    ],
)
def test_bad_values(width: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MultiDiagonal(width=width)


def test_a_window_larger_than_the_sequence() -> None:
    at = Layout((2, 3, 4)).coordinates()
    with pytest.raises(ValueError, match=r"width: wanted at most the 24 tokens of the grid \(2, 3, 4\), got 25; make"):
        MultiDiagonal(width=25).keep(at, at, (2, 3, 4))


def test_json() -> None:
    pattern = MultiDiagonal(width=17)
    assert pattern.to_dict() == {"name": "multi_diagonal", "width": 17}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
