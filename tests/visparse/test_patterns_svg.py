import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import Pattern, SpatialHead, TemporalHead, pattern_from_dict
from visparse.patterns.spatial_head import svg_width
from visparse.patterns.testing import Token, check_flex, check_pattern, sweep


def ordered(grid: Grid, temporal: bool) -> list[Token]:
    """The tokens frame by frame, or all frames of a place together."""
    frames, places = range(grid[0]), [(row, column) for row in range(grid[1]) for column in range(grid[2])]
    if temporal:
        return [(frame, *place) for place in places for frame in frames]
    return [(frame, *place) for frame in frames for place in places]


def kept(grid: Grid, width: Fraction, up: bool, sink: str, temporal: bool) -> dict[Token, set[Token]]:
    """The keys of each query, by the published masks: a band rounded to 128 tokens, and a sink."""
    tokens, frame = ordered(grid, temporal), grid[1] * grid[2]
    steps = 0
    while (steps + (0 if up else 1)) * 128 < width * frame or (not up and (steps + 1) * 128 <= width * frame):
        steps += 1
    furthest = 128 * steps if up else 128 * steps - 1
    sinks = {"frame": {token for token in tokens if token[0] == 0}, "order": set(tokens[:frame]), "none": set()}
    return {
        token: set(tokens[max(0, at - furthest) : at + furthest + 1]) | sinks[sink] for at, token in enumerate(tokens)
    }


def build(temporal: bool, width: float, up: bool, sink: str) -> Pattern:
    rounding = "up" if up else "down"
    if temporal:
        return TemporalHead(width=width, sink=sink, rounding=rounding)
    return SpatialHead(width=width, sink=sink == "frame", rounding=rounding)


def test_seeded_sweep() -> None:
    checked = 0
    for case, (random, small) in enumerate(sweep(1000, most=40)):
        grid = (small[0], small[1] * random.choice((1, 2, 3)), small[2] * 5)
        width = Fraction(random.randint(1, 8 * grid[0]), 8)
        temporal, up = random.random() < 0.5, random.random() < 0.6
        sink = random.choice(("frame", "none", "order") if temporal else ("frame", "none"))
        if grid[0] * grid[1] * grid[2] > 450 or (not up and width * grid[1] * grid[2] < 128):
            continue
        keys = kept(grid, width, up, sink, temporal)
        pattern = build(temporal, float(width), up, sink)
        check_pattern(pattern, grid, keys, compiled=case % 4 == 0)
        checked += 1
        if checked == 300:
            return
    raise AssertionError(f"only {checked} cases")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.data())
def test_odd_ones(frames: int, height: int, width: int, temporal: bool, data: st.DataObject) -> None:
    grid = (frames, height, width)
    part = data.draw(st.integers(1, 16 * frames))
    sink = data.draw(st.sampled_from(("frame", "none", "order") if temporal else ("frame", "none")))
    keys = kept(grid, Fraction(part, 16), True, sink, temporal)
    check_pattern(build(temporal, part / 16, True, sink), grid, keys)


def test_published_reach() -> None:
    grid = (21, 45, 80)
    at = Layout(grid).coordinates()
    query = at[10 * 3600 : 10 * 3600 + 1]

    def keys(pattern: Pattern) -> list[int]:
        return pattern.keep(query, at, grid)[0].nonzero()[:, 0].tolist()

    up = keys(SpatialHead(width=2, sink=False))  # 7200 tokens are 56.25 blocks: up to 57, and that distance is kept
    assert (up[0], up[-1], len(up)) == (36000 - 7296, 36000 + 7296, 2 * 7296 + 1)
    down = keys(SpatialHead(width=2, sink=False, rounding="down"))  # down to 56, and that distance is dropped
    assert (down[0], down[-1], len(down)) == (36000 - 7167, 36000 + 7167, 2 * 7167 + 1)
    with_sink = keys(SpatialHead(width=2))
    assert with_sink == [*range(3600), *up]


def test_sinks_of_temporal_heads_are_different_keys() -> None:
    """In the published program for Wan the sink of temporal heads is the first places of all frames."""
    grid = (16, 16, 16)
    at = Layout(grid).coordinates()
    last = at[-1:]

    def sink(name: str) -> list[list[int]]:
        band = TemporalHead(width=0.5, sink="none").keep(last, at, grid)[0]
        return at[TemporalHead(width=0.5, sink=name).keep(last, at, grid)[0] & ~band].tolist()

    assert {token[0] for token in sink("frame")} == {0}
    assert sink("order") == [[frame, 0, column] for frame in range(16) for column in range(16)]


def test_text_is_always_seen() -> None:
    layout = Layout((2, 16, 16), before=5, after=7)
    lists = compile_lists([SpatialHead(width=0.5), TemporalHead(width=0.5)], layout, block_q=64, block_k=64)
    mask = lists.to_mask()
    for text in (slice(0, 5), slice(5 + 512, None)):
        assert mask[:, text].all()
        assert mask[:, :, text].all()
    assert not mask.all()


def test_width_of_a_density() -> None:
    layout = Layout((33, 45, 80), after=256)  # HunyuanVideo at density 0.25
    tokens = 33 * 3600 + 256
    share = Fraction(1, 4) - Fraction(2 * 256, tokens)
    width = svg_width(0.25, layout)
    assert (1 - width * 3600 / tokens) ** 2 == pytest.approx(float(1 - share), abs=1e-12)
    assert width == pytest.approx(4.35, abs=0.02)
    grid = (21, 45, 80)
    pattern = SpatialHead(width=svg_width(0.3, Layout(grid)), sink=False)
    lists = compile_lists([pattern], Layout(grid), block_q=128, block_k=128, order="row-major")
    assert lists.density == pytest.approx(0.3, abs=0.002)  # the rounding to 128 tokens is the difference


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0, 0.003])
def test_a_density_that_cannot_be(density: float) -> None:
    with pytest.raises(ValueError, match=r"density: wanted above 0.004, which the text takes, and below 1, got "):
        svg_width(density, Layout((33, 45, 80), after=256))


def test_flex_attention_agrees() -> None:
    layout = Layout((4, 8, 9), before=3, after=2)
    for pattern in (SpatialHead(width=0.4), TemporalHead(width=0.4), TemporalHead(width=0.4, sink="order")):
        check_flex(pattern, layout)


@pytest.mark.parametrize("build_one", [SpatialHead, TemporalHead])
@pytest.mark.parametrize(
    ("source", "target", "width", "wanted"),
    [
        ((21, 30, 52), (21, 45, 80), 3.5, 3.5),
        ((21, 45, 80), (42, 45, 80), 3.5, 7.0),
        ((21, 45, 80), (21, 80, 45), 3.5, 3.5),
        ((21, 45, 80), (1, 45, 80), 21, 1.0),
        ((21, 45, 80), (7, 45, 80), 1.5, 0.5),
    ],
)
def test_rescale(build_one: type, source: Grid, target: Grid, width: float, wanted: float) -> None:
    assert build_one(width=width, rounding="down").rescale(source, target) == build_one(width=wanted, rounding="down")


@pytest.mark.parametrize("build_one", [SpatialHead, TemporalHead])
@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"width": 0}, ValueError, "width: wanted a positive number of frames, got 0; svg_width gives one"),
        ({"width": float("inf")}, ValueError, "width: wanted a positive number of frames, got inf"),
        ({"width": "2"}, TypeError, "width: wanted a number of frames, got str '2'; 1.5 is possible"),
        ({"width": True}, TypeError, "width: wanted a number of frames, got bool True"),
        ({"width": 2, "rounding": "dwn"}, ValueError, r"rounding: wanted 'up' .* got 'dwn'; did you mean 'down'"),
    ],
)
def test_bad_values(build_one: type, fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build_one(**fields)


def test_bad_sinks() -> None:
    with pytest.raises(TypeError, match="sink: wanted a bool, got str 'frame'; True keeps the first frame"):
        SpatialHead(width=1, sink="frame")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sink: wanted 'frame', 'order' or 'none', got 'fram'; did you mean 'frame'"):
        TemporalHead(width=1, sink="fram")


@pytest.mark.parametrize("build_one", [SpatialHead, TemporalHead])
@pytest.mark.parametrize(
    ("fields", "grid", "text"),
    [
        ({"width": 2.5}, (2, 8, 8), r"width: wanted at most the 2 frames of the grid \(2, 8, 8\), got 2.5; make it"),
        ({"width": 1, "rounding": "down"}, (2, 8, 8), r"nothing is left of 1 frames of 64 tokens .*use rounding='up'"),
    ],
)
def test_a_width_that_does_not_fit(build_one: type, fields: dict, grid: Grid, text: str) -> None:
    at = Layout(grid).coordinates()
    with pytest.raises(ValueError, match=text):
        build_one(**fields).keep(at, at, grid)


def test_json() -> None:
    for pattern in (SpatialHead(width=1.5, sink=False), TemporalHead(width=2, sink="order", rounding="down")):
        assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
