import json
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import PowerOfTwo, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def seen(grid: Grid, block: int, window: int, sink: int) -> dict[Token, set[Token]]:
    """The keys of each query: cut the sequence into blocks, and from each block walk in both directions."""
    tokens = [(frame, row, column) for frame in range(grid[0]) for row in range(grid[1]) for column in range(grid[2])]
    blocks = [tokens[at : at + block] for at in range(0, len(tokens), block)]
    keys: dict[Token, set[Token]] = {}
    for own, queries in enumerate(blocks):
        sees = set(range(own - window + 1, own + window)) | set(range(sink))
        step = 1
        while step < len(blocks):
            sees |= {own - step, own + step}
            step *= 2
        found = {token for at, keys_of_block in enumerate(blocks) if at in sees for token in keys_of_block}
        keys.update(dict.fromkeys(queries, found))
    return keys


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        block, window, sink = random.randint(1, 12), random.randint(1, 4), random.randint(0, 3)
        pattern = PowerOfTwo(block=block, window=window, sink=sink)
        check_pattern(pattern, grid, seen(grid, block, window, sink), compiled=case % 3 == 0)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 150),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_odd_ones(grid: Grid, block: int, window: int, sink: int) -> None:
    check_pattern(PowerOfTwo(block=block, window=window, sink=sink), grid, seen(grid, block, window, sink))


def test_blocks_of_the_published_setting() -> None:
    """32k tokens are 128 blocks; the causal half of the last block's row has ten of them."""
    grid = (1, 1, 32768)
    at = Layout(grid).coordinates()
    kept = PowerOfTwo().keep(at[-1:], at, grid)[0].view(128, 256)
    assert kept.any(1).equal(kept.all(1))
    assert (127 - kept.all(1).nonzero()[:, 0]).tolist() == [127, 64, 32, 16, 8, 4, 3, 2, 1, 0]
    middle = PowerOfTwo(window=1, sink=0).keep(at[64 * 256 : 64 * 256 + 1], at, grid)[0].view(128, 256)
    distances = [1, 2, 4, 8, 16, 32]
    wanted = sorted([0, 64, *(64 - step for step in distances), *(64 + step for step in distances)])
    assert middle.all(1).nonzero()[:, 0].tolist() == wanted


def test_flex_attention_agrees() -> None:
    check_flex(PowerOfTwo(block=4, window=2), Layout((3, 5, 7), before=3, after=2))


def test_rescale_changes_nothing() -> None:
    pattern = PowerOfTwo(block=64)
    assert pattern.rescale((21, 30, 52), (1, 7, 11)) is pattern


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"block": 0}, ValueError, "block: wanted at least 1, got 0; count it in tokens; 256 is published"),
        ({"window": 0}, ValueError, "window: wanted at least 1, got 0; count it in blocks; 5 is published"),
        ({"sink": -1}, ValueError, "sink: wanted at least 0, got -1; count it in blocks; 1 is published"),
        ({"sink": True}, TypeError, "sink: wanted a whole number, got bool True"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        PowerOfTwo(**fields)


def test_a_block_larger_than_the_sequence_is_dense() -> None:
    at = Layout((2, 3, 4)).coordinates()
    assert PowerOfTwo(block=prod((2, 3, 4))).keep(at, at, (2, 3, 4)).all()


def test_json() -> None:
    pattern = PowerOfTwo(block=64, window=2, sink=0)
    assert pattern.to_dict() == {"name": "power_of_two", "block": 64, "window": 2, "sink": 0}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
