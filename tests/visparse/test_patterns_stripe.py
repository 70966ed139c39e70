import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Stripe, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def columns(grid: Grid, every: int, width: int, offset: int) -> dict[Token, set[Token]]:
    """The keys of every query, the same for all: lay stripes from before the sequence to its end."""
    tokens = [(frame, row, column) for frame in range(grid[0]) for row in range(grid[1]) for column in range(grid[2])]
    kept = set()
    start = offset - every
    while start < len(tokens):
        kept |= {tokens[at] for at in range(start, start + width) if 0 <= at < len(tokens)}
        start += every
    return dict.fromkeys(tokens, kept)


def test_seeded_sweep() -> None:
    checked = 0
    for case, (random, grid) in enumerate(sweep(340)):
        every = random.randint(1, 40)
        width, offset = random.randint(1, every), random.randint(0, every - 1)
        kept = columns(grid, every, width, offset)
        if kept[0, 0, 0]:
            pattern = Stripe(every=every, width=width, offset=offset)
            check_pattern(pattern, grid, kept, compiled=case % 3 == 0)
            checked += 1
    assert checked >= 300


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.data())
def test_odd_ones(grid: Grid, data: st.DataObject) -> None:
    every = data.draw(st.integers(1, 130))
    width, offset = data.draw(st.integers(1, every)), data.draw(st.integers(0, every - 1))
    kept, pattern = columns(grid, every, width, offset), Stripe(every=every, width=width, offset=offset)
    if kept[0, 0, 0]:
        check_pattern(pattern, grid, kept)
        return
    at = Layout(grid).coordinates()
    with pytest.raises(ValueError, match=r"offset: no stripe lies on the .* make it at most"):
        pattern.keep(at, at, grid)


def test_flex_attention_agrees() -> None:
    check_flex(Stripe(every=9, width=2, offset=4), Layout((3, 5, 7), before=3, after=2))


@pytest.mark.parametrize(
    ("source", "target", "numbers", "wanted"),
    [
        ((21, 30, 52), (21, 60, 104), (1560, 10, 78), (6240, 40, 312)),  # one stripe a frame stays one stripe a frame
        ((21, 45, 80), (41, 45, 80), (3600, 10, 78), (3600, 10, 78)),
        ((21, 45, 80), (21, 80, 45), (36, 2, 7), (36, 2, 7)),
        ((4, 8, 8), (4, 4, 4), (5, 1, 4), (1, 1, 0)),  # thinner than a token: every key
        ((4, 8, 8), (1, 8, 16), (64, 64, 63), (128, 128, 126)),
    ],
)
def test_rescale(source: Grid, target: Grid, numbers: Grid, wanted: Grid) -> None:
    every, width, offset = numbers
    scaled = Stripe(every=every, width=width, offset=offset).rescale(source, target)
    assert (scaled.every, scaled.width, scaled.offset) == wanted


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"every": 0}, ValueError, "every: wanted at least 1, got 0; count it in tokens"),
        ({"every": 4, "width": 0}, ValueError, "width: wanted at least 1, got 0"),
        ({"every": 4, "width": 5}, ValueError, "width: wanted at most every=4, got 5; make the stripes thinner"),
        ({"every": 4, "offset": -1}, ValueError, "offset: wanted at least 0, got -1"),
        ({"every": 4, "offset": 6}, ValueError, "offset: wanted below every=4, got 6; stripes repeat, so 2 gives"),
        ({"every": 4.0}, TypeError, "every: wanted a whole number, got float 4.0"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Stripe(**fields)


def test_json() -> None:
    pattern = Stripe(every=12, width=3, offset=2)
    assert pattern.to_dict() == {"name": "stripe", "every": 12, "width": 3, "offset": 2}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
