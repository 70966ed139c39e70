import random
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import Radial
from visparse.patterns.radial_blocks import block_map
from visparse.patterns.testing import Token, check_flex, check_pattern


def paper_keeps(i: int, k: int, j: int, l: int, s: int, sink: bool) -> bool:
    """Equation 4 for one pair of tokens."""
    distance = max(abs(i - j), 1)
    width = 1
    while width * 2 <= distance:
        width *= 2
    if sink and j == 0:
        return True
    if width <= s and abs(k - l) + 1 <= Fraction(s, width):
        return True
    return abs(i - j) % -(-width // s) == 0 and k == l


def paper_keeps_tokens(q: Token, k: Token, grid: Grid, sink: bool) -> bool:
    (i, q_row, q_column), (j, k_row, k_column) = q, k
    s = grid[1] * grid[2]
    return paper_keeps(i, q_row * grid[2] + q_column, j, k_row * grid[2] + k_column, s, sink)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_paper(frames: int, height: int, width: int, sink: bool) -> None:
    grid = (frames, height, width)
    s = height * width
    at = Layout(grid).coordinates()
    tokens = list(product(range(frames), range(s)))
    expected = [[paper_keeps(i, k, j, l, s, sink) for j, l in tokens] for i, k in tokens]
    assert Radial(sink=sink).keep(at, at, grid).tolist() == expected


def test_paper_drops_frames_where_the_band_is_below_one_token() -> None:
    grid = (20, 1, 2)  # beyond distance 4 only every 2nd, then every 4th, then every 8th frame is seen
    at = Layout(grid).coordinates()
    row = Radial(sink=False).keep(at[:1], at, grid)[0]
    assert row.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def code_map(grid: Grid, decay: float, sink: bool, block: int) -> list[list[bool]]:
    """The published code's rule, with whole masks, in plain numbers."""
    frames, s = grid[0], grid[1] * grid[2]
    tokens = frames * s
    blocks = -(-tokens // block)
    result = [[row == col for col in range(blocks)] for row in range(blocks)]
    for i, j in product(range(frames), repeat=2):
        distance = abs(i - j)
        length = 2 ** s.bit_length() / 2 ** distance.bit_length()
        half_width = float(s) if distance <= 1 else max(length * decay, block)
        dropped = length < 128 and distance % int(128 / length) != 0
        side = -(-s // block)
        rows = (blocks if i == frames - 1 else i * s // block + side) - i * s // block
        cols = (blocks if j == frames - 1 else j * s // block + side) - j * s // block
        for row, col in product(range(rows), range(cols)):
            first_row, first_col = (i * s // block + row) * block, (j * s // block + col) * block
            exist = min(block, tokens - first_row)
            high = some = 0
            for key in range(first_col, first_col + block):
                l = key - j * s
                places = [token - i * s for token in range(first_row, first_row + exist)]
                count = 0
                if 0 <= l < s:
                    inside = [k for k in places if 0 <= k < s]
                    kept = [k for k in inside if (sink and j == 0) or (not dropped and abs(k - l) <= half_width)]
                    count = len(kept)
                high += Fraction(count, exist) > Fraction(1, 3)
                some += count > 0
            if some and Fraction(high, some) > Fraction(3, 5):
                result[i * s // block + row][j * s // block + col] = True
    return result


@pytest.mark.parametrize(
    ("grid", "decay", "sink", "block"),
    [
        ((5, 16, 16), 0.3, False, 32),
        ((4, 16, 16), 1.0, True, 64),
        ((6, 10, 13), 0.4, False, 32),  # frame 4 apart is kept, 5 apart is dropped
        ((4, 13, 20), 0.2, True, 48),  # frames and blocks are not aligned
        ((3, 5, 7), 1.0, True, 16),
        ((3, 5, 7), 1.0, False, 64),  # a block over two frames
        ((1, 9, 9), 1.0, True, 16),
        ((5, 6, 12), 0.25, False, 32),  # the last frame begins in a block as others do, but its last block is short
    ],
)
def test_code(grid: Grid, decay: float, sink: bool, block: int) -> None:
    expected = code_map(grid, decay, sink, block)
    assert block_map(grid, decay, sink, block).tolist() == expected
    at = Layout(grid).coordinates()
    kept = Radial(variant="code", decay=decay, sink=sink, block=block).keep(at[::3], at[::5], grid).tolist()
    tokens = range(len(at))
    assert kept == [[expected[q // block][k // block] for k in tokens[::5]] for q in tokens[::3]]


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "percent"),
    [
        (18, 0.2, True, 28.7),
        (18, 0.8, True, 37.7),
        (18, 1.0, True, 43.1),
        (30, 0.95, False, 27.5),
        (30, 0.95, True, 30.1),
    ],
)
def test_code_densities_measured_on_the_published_program(
    frames: int, decay: float, sink: bool, percent: float
) -> None:
    density = block_map((frames, 48, 80), decay, sink, 128).float().mean().item()
    assert round(100 * density, 1) == percent


def test_density_of_lists_is_the_published_one() -> None:
    pattern = Radial(variant="code", decay=0.2)
    lists = compile_lists([pattern], Layout((18, 48, 80)), block_q=128, block_k=128, order="row-major")
    assert round(100 * lists.density, 1) == round(100 * lists.block_density, 1) == 28.7


def test_rescale_keeps_the_pattern_and_refuses_small_frames() -> None:
    code = Radial(variant="code", decay=0.2)
    for pattern in (Radial(), Radial(sink=False), code):
        for target in ((18, 48, 80), (33, 30, 52), (1, 48, 80), (21, 80, 45)):
            assert pattern.rescale((21, 45, 80), target) is pattern
    with pytest.raises(ValueError, match=r"block: the published code keeps nothing .* got 42 tokens a frame"):
        code.rescale((21, 45, 80), (4, 6, 7))
    assert Radial().rescale((21, 45, 80), (4, 6, 7)) == Radial()


def test_flex_attention_agrees() -> None:
    check_flex(Radial(), Layout((3, 5, 7), before=2, after=3))
    check_flex(Radial(variant="code", block=16), Layout((3, 5, 7), before=2))


def test_lists_of_the_paper_rule_seeded_sweep() -> None:
    generator = random.Random(0)
    for _ in range(150):
        grid = (generator.randint(1, 9), generator.randint(1, 5), generator.choice([1, 2, 3, 5, 7]))
        sink, tokens = generator.random() < 0.5, list(product(*map(range, grid)))
        keys = {q: {k for k in tokens if paper_keeps_tokens(q, k, grid, sink)} for q in tokens}
        check_pattern(Radial(sink=sink), grid, keys)


@pytest.mark.parametrize("pattern", [Radial(), Radial(sink=False), Radial(variant="code", block=16)])
@pytest.mark.parametrize("grid", [(1, 1, 7), (1, 5, 5), (7, 3, 3), (9, 4, 5)])
def test_every_query_sees_itself(pattern: Radial, grid: Grid) -> None:
    at = Layout(grid).coordinates()
    assert pattern.keep(at, at, grid).diagonal().all()


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"variant": "papr"}, ValueError, "variant: wanted 'paper' or 'code', got 'papr'; did you mean 'paper'"),
        ({"variant": "code", "decay": 0.0}, ValueError, "decay: wanted a positive finite number, got 0.0"),
        ({"variant": "code", "decay": float("nan")}, ValueError, "decay: wanted a positive finite number, got nan"),
        ({"variant": "code", "decay": "1"}, TypeError, "decay: wanted float, got str '1'"),
        ({"variant": "code", "block": 0}, ValueError, "block: wanted at least 1 token, got 0"),
        ({"sink": 1}, TypeError, "sink: wanted bool, got int 1"),
        (
            {"decay": 0.5},
            ValueError,
            "decay, block: the paper's rule has neither, got 0.5 and 128; use decay=1.0 and block=128",
        ),
        ({"block": 64}, ValueError, "with it, or variant='code'"),
    ],
)
def test_bad_values(fields: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Radial(**fields)


def test_frames_too_small_for_the_code() -> None:
    at = Layout((4, 6, 6)).coordinates()
    with pytest.raises(
        ValueError, match=r"got 36 tokens a frame \(grid \(4, 6, 6\)\) and block 128; use variant='paper'"
    ):
        Radial(variant="code").keep(at, at, (4, 6, 6))
