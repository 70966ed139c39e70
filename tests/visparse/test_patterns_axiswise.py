"""What all windows have in common: block lists, FlexAttention, JSON, and that one number stands for the long axes."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import (
    Disc,
    Halo,
    Neighborhood,
    Pattern,
    ShiftedWindow,
    SlidingTile,
    Window,
    pattern_from_dict,
)

CASES: list[tuple[Grid, Pattern]] = [
    ((5, 7, 11), SlidingTile(tile=(2, 3, 4), window=(1, 1, 3))),
    ((4, 8, 8), SlidingTile(tile=(2, 4, 2), window=(2, 1, 3))),
    ((1, 13, 17), SlidingTile(tile=4, window=3)),
    ((1, 1, 97), SlidingTile(tile=8, window=5)),
    ((5, 7, 11), Window(window=(2, 3, 4))),
    ((1, 13, 17), Window(window=4)),
    ((5, 7, 11), ShiftedWindow(window=(2, 3, 4))),
    ((1, 13, 17), ShiftedWindow(window=8, shift=3)),
    ((1, 1, 97), ShiftedWindow(window=16)),
    ((5, 7, 11), Halo(block=(2, 3, 4), halo=(0, 1, 2))),
    ((1, 13, 17), Halo(block=4, halo=2)),
    ((3, 8, 8), Halo(block=(1, 4, 4), halo=(1, 2, 2))),
    ((5, 7, 11), Disc(radius=3)),
    ((1, 13, 17), Disc(radius=5)),
    ((1, 1, 97), Disc(radius=6)),
    ((5, 7, 11), Neighborhood(window=(2, 3, 6), stride=(1, 2, 4), dilation=(2, 1, 1), causal=(True, False, False))),
    ((1, 13, 17), Neighborhood(window=5, stride=2, dilation=2)),
]
EACH = pytest.mark.parametrize(("grid", "pattern"), CASES, ids=lambda value: str(value).replace(" ", ""))


def kept_with_extra(pattern: Pattern, layout: Layout) -> Tensor:
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(layout.before, layout.before + layout.visual)
    at = layout.coordinates()
    mask[inside, inside] = pattern.keep(at, at, layout.grid)
    return mask


@EACH
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("order", ["auto", "row-major"])
def test_lists_mean_what_the_pattern_keeps(grid: Grid, pattern: Pattern, boxes: bool, order: str) -> None:
    layout = Layout(grid, before=3, after=5)
    lists = compile_lists([pattern], layout, block_q=16, block_k=32, order=order, boxes=boxes).validate()
    assert torch.equal(lists.to_mask()[0], kept_with_extra(pattern, layout))


@EACH
def test_flex_attention_agrees(grid: Grid, pattern: Pattern) -> None:
    layout = Layout(grid, before=2, after=1)
    tokens = layout.tokens
    block_mask = create_block_mask(pattern.mask_mod(layout), 1, 1, tokens, tokens, device="cpu", BLOCK_SIZE=32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=block_mask)
    scores = (q @ k.mT / 8**0.5).masked_fill(~kept_with_extra(pattern, layout), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


@EACH
def test_every_query_sees_itself(grid: Grid, pattern: Pattern) -> None:
    at = Layout(grid).coordinates()
    assert pattern.keep(at, at, grid).diagonal().all()


@EACH
def test_json_round_trip(grid: Grid, pattern: Pattern) -> None:
    back = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert back == pattern
    assert hash(back) == hash(pattern)


@EACH
@pytest.mark.parametrize("target", [(1, 5, 7), (8, 14, 22), (2, 3, 40), (1, 1, 1)])
def test_a_rescaled_pattern_fits_and_comes_back_unchanged_on_its_own_grid(
    grid: Grid, pattern: Pattern, target: Grid
) -> None:
    at = Layout(target).coordinates()
    assert pattern.rescale(grid, target).keep(at, at, target).diagonal().all()
    assert pattern.rescale(grid, grid) == pattern


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        (SlidingTile(tile=2, window=3), SlidingTile(tile=(1, 2, 2), window=(1, 3, 3))),
        (Window(window=3), Window(window=(1, 3, 3))),
        (ShiftedWindow(window=3), ShiftedWindow(window=(1, 3, 3))),
        (ShiftedWindow(window=3, shift=2), ShiftedWindow(window=(1, 3, 3), shift=(0, 2, 2))),
        (Halo(block=3, halo=2), Halo(block=(1, 3, 3), halo=(0, 2, 2))),
    ],
)
def test_one_number_stands_for_axes_longer_than_one(pattern: Pattern, whole: Pattern) -> None:
    grid = (1, 6, 7)
    at = Layout(grid).coordinates()
    assert torch.equal(pattern.keep(at, at, grid), whole.keep(at, at, grid))
