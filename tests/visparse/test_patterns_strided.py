import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Strided, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def seen(grid: Grid, block: int, local: int, stride: int, shard: int) -> dict[Token, set[Token]]:
    """The keys of each query: the blocks of the shard, counted off one by one, and the near blocks."""
    tokens = [(frame, row, column) for frame in range(grid[0]) for row in range(grid[1]) for column in range(grid[2])]
    blocks = [tokens[at : at + block] for at in range(0, len(tokens), block)]
    of_shard = list(range((stride - shard) % stride, len(blocks), stride))
    keys: dict[Token, set[Token]] = {}
    for own, queries in enumerate(blocks):
        near = range(max(0, own - local + 1), min(len(blocks), own + local))
        found = {token for at in (*near, *of_shard) for token in blocks[at]}
        keys.update(dict.fromkeys(queries, found))
    return keys


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        block, local, stride = random.randint(1, 12), random.randint(1, 3), random.randint(1, 7)
        shard = random.randrange(stride)
        pattern = Strided(block=block, local=local, stride=stride, shard=shard)
        check_pattern(pattern, grid, seen(grid, block, local, stride, shard), compiled=case % 3 == 0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.integers(1, 150), st.data())
def test_odd_ones(grid: Grid, block: int, data: st.DataObject) -> None:
    local, stride = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    shard = data.draw(st.integers(0, stride - 1))
    pattern = Strided(block=block, local=local, stride=stride, shard=shard)
    check_pattern(pattern, grid, seen(grid, block, local, stride, shard))


@pytest.mark.parametrize(
    ("heads", "stride", "shards"),
    [
        (6, 4, [0, 1, 2, 3, 0, 1]),
        (4, 4, [0, 1, 2, 3]),
        (2, 8, [0, 4]),  # fewer heads than shards: spread
        (3, 8, [0, 2, 4]),
        (1, 4, [0]),
    ],
)
def test_shards_of_heads(heads: int, stride: int, shards: list[int]) -> None:
    patterns = Strided.per_head(heads, block=3, local=1, stride=stride)
    assert [pattern.shard for pattern in patterns] == shards
    assert {(pattern.block, pattern.local, pattern.stride) for pattern in patterns} == {(3, 1, stride)}


def test_all_heads_together_see_everything() -> None:
    grid = (3, 5, 7)
    at = Layout(grid).coordinates()
    masks = [pattern.keep(at, at, grid) for pattern in Strided.per_head(4, block=4, local=1)]
    assert torch.stack(masks).any(0).all()
    assert not torch.stack(masks[:3]).any(0).all()


def test_flex_attention_agrees() -> None:
    check_flex(Strided(block=4, local=2, stride=3, shard=1), Layout((3, 5, 7), before=3, after=2))


def test_rescale_changes_nothing() -> None:
    pattern = Strided(block=64, shard=2)
    assert pattern.rescale((21, 30, 52), (1, 7, 11)) is pattern


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"block": 0}, ValueError, "block: wanted at least 1, got 0; count it in tokens; 64 is published"),
        ({"local": 0}, ValueError, "local: wanted at least 1, got 0; count it in blocks; 4 is published"),
        ({"stride": 0}, ValueError, "stride: wanted at least 1, got 0; count it in blocks"),
        ({"shard": -1}, ValueError, "shard: wanted at least 0, got -1; shards are numbered from 0"),
        ({"shard": 4}, ValueError, "shard: wanted below stride=4, got 4; Strided.per_head numbers the shards"),
        ({"stride": 2.0}, TypeError, "stride: wanted a whole number, got float 2.0"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Strided(**fields)


def test_no_heads() -> None:
    with pytest.raises(ValueError, match="heads: wanted at least 1, got 0; give the heads of the layer"):
        Strided.per_head(0)
    with pytest.raises(ValueError, match="stride: wanted at least 1, got 0"):
        Strided.per_head(4, stride=0)


def test_json() -> None:
    pattern = Strided(block=32, local=2, stride=5, shard=3)
    assert pattern.to_dict() == {"name": "strided", "block": 32, "local": 2, "stride": 5, "shard": 3}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
