"""Synthetic camera motion does what its caption says, and captions are found again by their index."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

Script = Callable[[str], ModuleType]
SEEDS = range(4)


@pytest.fixture
def pixels() -> torch.Tensor:
    """One smooth random picture on a canvas, `uint8 [1, 3, 200, 216]`."""
    coarse = torch.rand(1, 3, 20, 22, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (200, 216), mode="bicubic").clamp(0, 1).mul(255).round().byte()


def ends(script: Script, pixels: torch.Tensor, motion: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last frame, at one pixel of the canvas a pixel: shifts are then whole-picture shifts."""
    clip = script("camera").camera_clips(
        pixels, torch.tensor([0]), torch.tensor([motion]), torch.Generator().manual_seed(seed), view=(1, 1), side=148
    )
    return clip[0, :, 0], clip[0, :, -1]


def shift_of(first: torch.Tensor, last: torch.Tensor) -> tuple[int, int]:
    """Rows and columns by which the content moved, found by comparing with the shifted picture."""

    def error(dy: int, dx: int) -> float:
        h, w = first.shape[1:]
        a = first[:, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)]
        b = last[:, max(0, dy) : h - max(0, -dy), max(0, dx) : w - max(0, -dx)]
        return float((a - b).square().mean())

    steps = [(s, 0) for s in range(-80, 81)] + [(0, s) for s in range(-80, 81)]
    best = min(steps, key=lambda s: error(*s))
    assert error(*best) < 0.02 * float((first - last).square().mean())
    return best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "axis", "sign", "reach"),
    [("pans left", 1, 1, 27), ("pans right", 1, -1, 27), ("pans up", 0, 1, 22), ("pans down", 0, -1, 22)],
)
def test_pan_moves_the_content_the_other_way(
    script: Script, pixels: torch.Tensor, name: str, axis: int, sign: int, reach: float, seed: int
) -> None:
    shift = shift_of(*ends(script, pixels, script("data").MOTIONS.index(name), seed))
    assert shift[1 - axis] == 0
    assert 2 * reach * 0.8 - 1 <= sign * shift[axis] <= 2 * reach * 1.2 + 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "sign"), [("zooms in", 1), ("zooms out", -1)])
def test_zoom_enlarges_or_shrinks(script: Script, name: str, sign: int, seed: int) -> None:
    square = torch.zeros(1, 3, 200, 216, dtype=torch.uint8)
    square[:, :, 75:125, 83:133] = 255
    first, last = ends(script, square, script("data").MOTIONS.index(name), seed)
    growth = float(((last + 1).sum() / (first + 1).sum()).log()) * sign
    assert 0.8 * 0.8 - 0.05 <= growth <= 0.8 * 1.2 + 0.05  # area: twice the side's 2 x 0.2 x speed


def test_without_motion_all_frames_are_one(script: Script, pixels: torch.Tensor) -> None:
    first, last = ends(script, pixels, 6, 0)
    torch.testing.assert_close(first, last, atol=0, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_shape_and_range(script: Script, pixels: torch.Tensor, frames: int) -> None:
    index, motion = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    clips = script("camera").camera_clips(pixels, index, motion, torch.Generator().manual_seed(0), frames, side=24)
    assert clips.shape == (7, 3, frames, 24, 24)
    assert clips.dtype == torch.float32
    assert -1 <= clips.min() < clips.max() <= 1


def test_one_frame_is_anywhere_on_the_way(script: Script, pixels: torch.Tensor) -> None:
    """A single frame is no fixed position: a pan's single frames spread further than those of a camera at rest."""
    column = torch.linspace(0, 255, 216).round().byte().expand(1, 3, 200, 216)  # brightness tells the position
    index = torch.zeros(64, dtype=torch.int64)

    def spread(motion: int) -> float:
        clips = script("camera").camera_clips(
            column, index, torch.full((64,), motion), torch.Generator().manual_seed(0), 1, side=16
        )
        return float(clips.mean((1, 2, 3, 4)).std())

    assert spread(0) > 3 * spread(6)


def test_captions_are_found_by_their_index(script: Script) -> None:
    data = script("data")
    captions = data.captions()
    assert captions[-1] == ""
    assert len(set(captions)) == len(captions) == len(data.NAMES) * 7 + 1
    for kind in range(len(data.NAMES)):
        for motion in range(7):
            index = int(data.caption_index(torch.tensor(kind), torch.tensor(motion)))
            assert captions[index] == data.caption(kind, None if motion == 6 else motion)
    assert data.caption(data.NAMES.index("airplane"), 0) == "an airplane, the camera pans left"
    assert data.caption(data.NAMES.index("pizza"), None) == "a pizza"
