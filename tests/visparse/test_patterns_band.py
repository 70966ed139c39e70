import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.layout import Grid, Layout
from visparse.patterns import Band, pattern_from_dict
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def band(grid: Grid, share: Fraction, per_frame: bool) -> dict[Token, set[Token]]:
    """The keys of each query, from lists of tokens: the sequence, or one frame, repeated for every frame."""
    frames = [[(frame, row, column) for row in range(grid[1]) for column in range(grid[2])] for frame in range(grid[0])]
    keys: dict[Token, set[Token]] = {}
    if per_frame:
        side = int(len(frames[0]) * share) // 2
        for own in frames:
            for at, token in enumerate(own):
                keys[token] = {key for other in frames for key in other[max(0, at - side) : at + side + 1]}
        return keys
    sequence = [token for frame in frames for token in frame]
    side = int(len(sequence) * share) // 2
    return {token: set(sequence[max(0, at - side) : at + side + 1]) for at, token in enumerate(sequence)}


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        share, per_frame = Fraction(random.randint(1, 32), 32), case % 2 == 0
        keys = band(grid, share, per_frame)
        pattern = Band(share=float(share), per_frame=per_frame)
        check_pattern(pattern, grid, keys, compiled=case % 3 == 0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.integers(1, 64), st.booleans())
def test_odd_ones(grid: Grid, parts: int, per_frame: bool) -> None:
    keys = band(grid, Fraction(parts, 64), per_frame)
    check_pattern(Band(share=parts / 64, per_frame=per_frame), grid, keys)


@pytest.mark.parametrize(
    ("share", "per_frame", "grid", "side"),
    [
        (0.0625, False, (1, 64, 64), 128),  # PixArt at 1024 px: w = 256 of 4096
        (0.03125, False, (1, 64, 64), 64),
        (0.03125, True, (13, 30, 45), 21),  # CogVideoX: w = int(42.1875) of 1350 places
    ],
)
def test_published_widths(share: float, per_frame: bool, grid: Grid, side: int) -> None:
    at = Layout(grid).coordinates()
    kept = Band(share=share, per_frame=per_frame).keep(at[1000:1001], at, grid)[0].view(grid[0], -1)
    wanted = list(range(1000 - side, 1000 + side + 1))
    assert [frame.nonzero()[:, 0].tolist() for frame in kept] == [wanted] * grid[0]


def test_flex_attention_agrees() -> None:
    for per_frame in (False, True):
        check_flex(Band(share=0.3, per_frame=per_frame), Layout((3, 5, 7), before=3, after=2))


def test_rescale_changes_nothing() -> None:
    pattern = Band(share=0.1, per_frame=True)
    assert pattern.rescale((21, 30, 52), (1, 7, 11)) is pattern


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"share": 0}, ValueError, "share: wanted above 0 and at most 1, got 0; 0.0625 keeps a sixteenth"),
        ({"share": 1.5}, ValueError, "share: wanted above 0 and at most 1, got 1.5"),
        ({"share": float("nan")}, ValueError, "share: wanted above 0 and at most 1, got nan"),
        ({"share": True}, TypeError, "share: wanted a number, got bool True"),
        ({"per_frame": 1}, TypeError, "per_frame: wanted a bool, got int 1; True is the form for video"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Band(**fields)


def test_json() -> None:
    pattern = Band(share=0.25, per_frame=True)
    assert pattern.to_dict() == {"name": "band", "share": 0.25, "per_frame": True}
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
