import json
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Diagonal, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def window(grid: Grid, width: int) -> dict[Token, set[Token]]:
    """The keys of each query: walk width // 2 tokens to either side of it, as far as there are any."""
    sequence = [(frame, row, column) for frame in range(grid[0]) for row in range(grid[1]) for column in range(grid[2])]
    keys: dict[Token, set[Token]] = {}
    for at, token in enumerate(sequence):
        keys[token] = {token}
        for step in range(1, width // 2 + 1):
            keys[token].update(sequence[at + step : at + step + 1])
            if at >= step:
                keys[token].add(sequence[at - step])
    return keys


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        width = random.randint(1, prod(grid))
        check_pattern(Diagonal(width=width), grid, window(grid, width), compiled=case % 3 == 0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.data())
def test_odd_ones(grid: Grid, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, prod(grid)))
    check_pattern(Diagonal(width=width), grid, window(grid, width))


def test_by_hand() -> None:
    at = Layout((1, 1, 8)).coordinates()

    def keys(query: int, width: int) -> list[int]:
        return Diagonal(width=width).keep(at[query : query + 1], at, (1, 1, 8))[0].nonzero()[:, 0].tolist()

    assert keys(4, 1) == [4]
    assert keys(4, 2) == keys(4, 3) == [3, 4, 5]
    assert keys(0, 5) == [0, 1, 2]  # cut, not shifted
    assert keys(7, 5) == [5, 6, 7]


def test_it_runs_over_the_ends_of_rows_and_frames() -> None:
    at = Layout((2, 2, 2)).coordinates()
    mask = Diagonal(width=3).keep(at, at, (2, 2, 2))
    assert mask[3, 4]
    assert mask[1, 2]
    assert mask.sum().item() == 8 + 2 * 7


def test_flex_attention_agrees() -> None:
    check_flex(Diagonal(width=11), Layout((3, 5, 7), before=3, after=2))


@pytest.mark.parametrize(
    ("source", "target", "width", "wanted"),
    [
        ((21, 30, 52), (21, 45, 80), 1561, 3602),  # 480p to 720p: 2.31 times the tokens of a frame
        ((21, 30, 52), (41, 30, 52), 1561, 1561),  # twice the frames: the same reach inside a frame
        ((21, 45, 80), (21, 80, 45), 99, 99),  # another aspect
        ((21, 45, 80), (1, 1, 60), 99, 2),
        ((21, 45, 80), (1, 2, 2), 99, 1),  # at least 1
        ((4, 2, 2), (1, 2, 3), 16, 6),  # at most the tokens
    ],
)
def test_rescale(source: Grid, target: Grid, width: int, wanted: int) -> None:
    assert Diagonal(width=width).rescale(source, target) == Diagonal(width=wanted)


@pytest.mark.parametrize(
    ("width", "error", "text"),
    [
        (0, ValueError, "width: wanted at least 1, got 0; count it in tokens of the row-major sequence"),
        (-3, ValueError, "width: wanted at least 1, got -3"),
        (2.5, TypeError, "width: wanted a whole number, got float 2.5"),
        (True, TypeError, "width: wanted a whole number, got bool True"),
    ],
)
def test_bad_values(width: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Diagonal(width=width)


def test_a_window_larger_than_the_sequence() -> None:
    at = Layout((2, 3, 4)).coordinates()
    assert Diagonal(width=24).keep(at, at, (2, 3, 4)).any(1).all()
    with pytest.raises(ValueError, match=r"width: wanted at most the 24 tokens of the grid \(2, 3, 4\), got 25; make"):
        Diagonal(width=25).keep(at, at, (2, 3, 4))


def test_json() -> None:
    pattern = Diagonal(width=17)
    assert pattern.to_dict() == {"name": "diagonal", "width": 17}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
