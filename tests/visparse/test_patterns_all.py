"""What must hold of every pattern that is registered, whoever wrote it."""

import json
import time
from collections.abc import Iterator
from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from visparse.compile import clear_cache, compile_lists
from visparse.layout import Grid, Layout
from visparse.order import visual_blocks
from visparse.patterns import Neighborhood, Pattern, Radial, Skip, Union, pattern_from_dict
from visparse.patterns.registry import PATTERNS
from visparse_kernels import attend, preferred_blocks, prefers_boxes

HOME = (5, 6, 9)  # the grid that the examples are made for

WINDOW = {"name": "neighborhood", "window": [3, 2, 5]}
EXAMPLES: dict[str, list[dict]] = {
    "band": [{"share": 0.2}, {"share": 0.3, "per_frame": True}],
    "diagonal": [{"width": 9}],
    "disc": [{"radius": 3}],
    "first_frame": [{}],
    "halo": [{"block": [2, 2, 4], "halo": [1, 1, 2]}],
    "intersection": [
        {"patterns": [WINDOW, {"name": "radial"}]},
        {"patterns": [WINDOW, WINDOW | {"window": [5, 6, 2]}]},
    ],
    "multi_diagonal": [{"width": 9}],
    "neighborhood": [
        {"window": [3, 4, 5]},
        {"window": [2, 3, 4], "stride": [1, 2, 2], "dilation": [2, 2, 1], "causal": [True, False, False]},
    ],
    "power_of_two": [{"block": 4, "window": 2}],
    "radial": [{}, {"sink": False}, {"variant": "code", "block": 8, "decay": 0.5}],
    "shifted_window": [{"window": [2, 3, 4]}],
    "sliding_tile": [{"tile": [2, 2, 3], "window": [1, 3, 1]}],
    "spatial_head": [{"width": 1}],
    "strided": [{"block": 6, "local": 2, "stride": 3, "shard": 1}],
    "stripe": [{"every": 12, "width": 2}],
    "temporal_head": [{"width": 1}],
    "union": [
        {"patterns": [WINDOW, {"name": "radial", "sink": False}]},
        {"patterns": [WINDOW, {"name": "first_frame"}]},
    ],
    "window": [{"window": [2, 3, 4]}],
}
MAY_BE_EMPTY = {"skip": "it keeps nothing"}
GRIDS = {
    "home": HOME,
    "odd sides": (3, 7, 11),
    "one frame": (1, 7, 13),
    "one row": (3, 1, 17),
    "a line": (1, 1, 67),
    "two frames": (2, 9, 5),
}


def examples(name: str) -> list[Pattern]:
    """Small patterns of one kind for the grid `HOME`; with default values where the table has none."""
    try:
        return [pattern_from_dict({"name": name} | fields) for fields in EXAMPLES.get(name, [{}])]
    except (TypeError, ValueError) as error:
        pytest.fail(f"the registered pattern {name!r} has no good example in EXAMPLES of {__file__}: {error}")


def on(name: str, grid: Grid) -> list[Pattern]:
    return [pattern.rescale(HOME, grid) for pattern in examples(name)]


def kept_by(pattern: Pattern, layout: Layout) -> Tensor:
    """The whole mask, in which extra tokens see everything and are seen; but not in skipped heads."""
    mask = torch.full((layout.tokens, layout.tokens), not isinstance(pattern, Skip))
    visual, at = slice(layout.before, layout.before + layout.visual), layout.coordinates()
    mask[visual, visual] = pattern.keep(at, at, layout.grid)
    return mask


every_pattern = pytest.mark.parametrize("name", sorted(PATTERNS))
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def test_examples_are_of_registered_patterns() -> None:
    assert set(EXAMPLES) | set(MAY_BE_EMPTY) <= set(PATTERNS)


def test_a_pattern_without_example_is_named() -> None:
    with pytest.raises(
        pytest.fail.Exception, match="the registered pattern 'novel' has no good example in EXAMPLES of"
    ):
        examples("novel")


@every_pattern
def test_json_and_names(name: str) -> None:
    for pattern in examples(name):
        back = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
        assert back == pattern
        assert hash(back) == hash(pattern)
        assert type(pattern).name == name
        assert type(pattern).__doc__


@every_pattern
@every_grid
def test_fast_paths_agree_with_the_definition(name: str, grid: Grid) -> None:
    layout = Layout(grid)
    at = layout.coordinates()
    for pattern in on(name, grid):
        kept = pattern.keep(at, at, grid)
        assert kept.dtype == torch.bool
        assert torch.equal(torch.stack([pattern.pairs(token, at, grid) for token in at]), kept), pattern
        assert torch.equal(pattern.pairs(at[None, :, None], at[None, None], grid)[0], kept), pattern
        factors, axes = pattern.factors(grid), pattern.axes(grid)
        if factors is not None:
            tables = [table[code][:, code] for code, table in factors]
            assert torch.equal(torch.stack([torch.ones_like(kept), *tables]).all(0), kept), pattern
        if axes is not None:
            by_axis = [table[at[:, axis]][:, at[:, axis]] for axis, table in enumerate(axes)]
            assert torch.equal(torch.stack(by_axis).all(0), kept), pattern
        for tile in (None, (2, 2, 4)):
            check_blocks(pattern, kept, visual_blocks(layout, tile, 16), visual_blocks(layout, tile, 32), grid)


def check_blocks(pattern: Pattern, kept: Tensor, q: Tensor, k: Tensor, grid: Grid) -> None:
    real = (q >= 0)[:, None, :, None] & (k >= 0)[None, :, None]
    masks = kept[q.clamp(min=0)][:, :, k.clamp(min=0)].transpose(1, 2) & real  # [n_q, n_k, block_q, block_k]
    some, every = pattern.cover(q, k, grid)
    assert not (masks.flatten(2).any(2) & ~some).any(), pattern
    assert ((masks == real).flatten(2).all(2) | ~every).all(), pattern
    rows, cols = some.nonzero(as_tuple=True)
    numbers = pattern.alike(q, k, rows, cols, grid)
    if numbers is not None:
        found = masks[rows, cols]
        _, index = torch.unique(numbers, return_inverse=True)
        first = torch.full((int(index.max()) + 1,), len(index)).scatter_reduce_(
            0, index, torch.arange(len(index)), "amin"
        )
        assert torch.equal(found[first[index]], found), pattern


@every_pattern
@every_grid
@pytest.mark.parametrize("boxes", [False, True], ids=["slots", "boxes"])
def test_lists_mean_what_the_pattern_keeps(name: str, grid: Grid, boxes: bool) -> None:
    for pattern in on(name, grid):
        for layout in (Layout(grid), Layout(grid, before=3, after=2)):
            wanted = kept_by(pattern, layout)
            for order in ("row-major", "auto"):
                lists = compile_lists([pattern], layout, block_q=16, block_k=32, order=order, boxes=boxes)
                assert torch.equal(lists.to_mask()[0], wanted), (pattern, order)
                assert round(lists.density * layout.tokens**2) == int(wanted.sum()), (pattern, order)


@every_pattern
@every_grid
def test_every_query_sees_a_key(name: str, grid: Grid) -> None:
    at = Layout(grid).coordinates()
    for pattern in on(name, grid):
        full_rows = pattern.keep(at, at, grid).any(1).all()
        assert full_rows == (name not in MAY_BE_EMPTY), f"{pattern} on {grid}: {MAY_BE_EMPTY.get(name, 'an empty row')}"


@every_pattern
@every_grid
def test_rescaled_patterns_fit(name: str, grid: Grid) -> None:
    at = Layout(HOME).coordinates()
    for pattern, moved in zip(examples(name), on(name, grid), strict=True):
        assert type(moved) is type(pattern)
        token = torch.zeros(1, 3, dtype=torch.int64)
        moved.pairs(token, token, grid)
        assert torch.equal(pattern.rescale(HOME, HOME).keep(at, at, HOME), pattern.keep(at, at, HOME))


@every_pattern
def test_flex_attention_agrees(name: str) -> None:
    """FlexAttention calls the mask function one pair at a time, under vmap."""
    layout = Layout(GRIDS["odd sides"], before=2, after=1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, layout.tokens, 16, generator=generator) for _ in range(3))
    for pattern in on(name, layout.grid):
        function = pattern.mask_mod(layout)
        block_mask = create_block_mask(function, None, None, layout.tokens, layout.tokens, device="cpu", BLOCK_SIZE=32)
        tokens, none = torch.arange(layout.tokens), torch.tensor(0)
        mask = function(none, none, tokens[:, None], tokens[None])
        visual = slice(layout.before, layout.before + layout.visual)
        assert torch.equal(mask[visual, visual], kept_by(pattern, layout)[visual, visual])
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), wanted, atol=1e-5, rtol=1e-5)


LARGE = {
    "separable": Neighborhood(window=(5, 9, 9)),
    "by blocks": Radial(variant="code", decay=0.2),
    "a union": Union(patterns=(Neighborhood(window=(5, 9, 9)), Neighborhood(window=(1, 21, 21)), Radial())),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pattern", LARGE.values(), ids=LARGE)
def test_720p_compiles_in_ten_seconds_on_two_cores(pattern: Pattern) -> None:
    """75,600 tokens in 20 s of one processor, so that other work on the machine does not count."""
    clear_cache()
    started = time.process_time()
    lists = compile_lists([pattern], Layout((21, 45, 80)), block_q=128, block_k=128)
    seconds = time.process_time() - started
    assert lists.q_len == prod((21, 45, 80))
    assert seconds < 20


@pytest.mark.gpu
@every_pattern
def test_on_a_gpu_attend_and_flexattention_agree(name: str) -> None:
    if name in MAY_BE_EMPTY:
        pytest.skip(f"{name}: {MAY_BE_EMPTY[name]}")
    layout = Layout(HOME, before=3, after=40)
    q, k, v = (torch.randn(1, layout.tokens, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    block_q, block_k = preferred_blocks("cuda", 64)
    compiled = torch.compile(flex_attention, dynamic=False)
    for pattern in examples(name):
        how = {"block_q": block_q, "block_k": block_k, "boxes": prefers_boxes("cuda", 64)}
        out = attend(q, k, v, compile_lists([pattern], layout, **how, device="cuda"))
        size = layout.tokens
        mask = create_block_mask(pattern.mask_mod(layout, "cuda"), 1, 1, size, size, device="cuda")
        flex = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
        torch.testing.assert_close(out, flex, atol=2e-2, rtol=2e-2)
        torch.compiler.reset()
