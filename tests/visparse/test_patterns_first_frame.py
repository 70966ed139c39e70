import json
from itertools import product

import pytest
import torch

from visparse.layout import Grid, Layout
from visparse.patterns import FirstFrame, pattern_from_dict
from visparse.patterns.testing import check_flex, check_pattern, sweep


def test_seeded_sweep() -> None:
    for case, (random, grid) in enumerate(sweep(320)):
        frames = random.randint(1, grid[0])
        tokens = list(product(range(grid[0]), range(grid[1]), range(grid[2])))
        sink = [token for token in tokens if token[0] in list(range(grid[0]))[:frames]]
        check_pattern(FirstFrame(frames=frames), grid, dict.fromkeys(tokens, sink), compiled=case % 3 == 0)


def test_a_picture_is_dense() -> None:
    at = Layout((1, 5, 7)).coordinates()
    assert FirstFrame().keep(at, at, (1, 5, 7)).all()


def test_its_axes_are_its_definition() -> None:
    grid, at = (5, 3, 2), Layout((5, 3, 2)).coordinates()
    frames, height, width = FirstFrame(frames=2).axes(grid)
    assert frames.sum().item() == 10
    assert height.all()
    assert width.all()
    kept = frames[at[:, 0]][:, at[:, 0]] & height[at[:, 1]][:, at[:, 1]]
    assert torch.equal(kept, FirstFrame(frames=2).keep(at, at, grid))


def test_flex_attention_agrees() -> None:
    check_flex(FirstFrame(), Layout((3, 5, 7), before=3, after=2))


@pytest.mark.parametrize(
    ("target", "wanted"), [((41, 30, 52), 3), ((21, 80, 45), 3), ((2, 45, 80), 2), ((1, 45, 80), 1)]
)
def test_rescale(target: Grid, wanted: int) -> None:
    assert FirstFrame(frames=3).rescale((21, 45, 80), target) == FirstFrame(frames=wanted)


@pytest.mark.parametrize(
    ("frames", "error", "text"),
    [
        (0, ValueError, "frames: wanted at least 1, got 0; 1 is usual"),
        (1.0, TypeError, "frames: wanted a whole number, got float 1.0"),
    ],
)
def test_bad_values(frames: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FirstFrame(frames=frames)


def test_more_frames_than_the_grid_has() -> None:
    at, text = Layout((2, 3, 4)).coordinates(), r"frames: wanted at most the 2 of the grid \(2, 3, 4\), got 3; keep"
    with pytest.raises(ValueError, match=text):
        FirstFrame(frames=3).keep(at, at, (2, 3, 4))
    with pytest.raises(ValueError, match=text):
        FirstFrame(frames=3).axes((2, 3, 4))


def test_json() -> None:
    assert pattern_from_dict(json.loads(json.dumps(FirstFrame(frames=2).to_dict()))) == FirstFrame(frames=2)
