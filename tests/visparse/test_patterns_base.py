import json
import subprocess
import sys
from itertools import product

import pytest
import torch

from visparse.layout import Grid, Layout
from visparse.order import visual_blocks
from visparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip, draw, pattern_from_dict

PATTERNS: list[Pattern] = [
    Dense(),
    Skip(),
    Neighborhood(window=(2, 3, 4), stride=(1, 2, 2), dilation=(1, 2, 1), causal=(True, False, False)),
    Neighborhood(window=3),
    Radial(),
    Radial(sink=False),
    Radial(variant="code", decay=0.5, sink=False, block=16),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_json_round_trip(pattern: Pattern) -> None:
    back = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert back == pattern
    assert hash(back) == hash(pattern)
    assert type(pattern).from_dict(pattern.to_dict()) == pattern


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"window": 3}, ValueError, "name: wanted the name of a pattern, got None; known: dense, skip, neighborhood"),
        ({"name": "radical"}, ValueError, r"name: unknown pattern 'radical'; .*; did you mean 'radial'\?"),
        ({"name": "neighborhood", "windw": 3}, ValueError, "unknown key 'windw'; did you mean 'window'?"),
        ({"name": "dense", "x": 3}, ValueError, r"pattern 'dense' has an unknown key 'x' \(known: none\)"),
        ({"name": "neighborhood"}, ValueError, "pattern 'neighborhood' lacks the key 'window'; give it a value"),
        ({"name": "neighborhood", "window": [3, 0, 3]}, ValueError, r"window: wanted at least 1, got \(3, 0, 3\)"),
    ],
)
def test_bad_json(data: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pattern_from_dict(data)


def test_from_dict_of_another_pattern() -> None:
    with pytest.raises(ValueError, match="name: wanted 'radial', got 'dense'; read it with pattern_from_dict"):
        Radial.from_dict({"name": "dense"})


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", [(4, 7, 9), (3, 8, 8), (5, 6, 13)])
@pytest.mark.parametrize(
    ("q_tile", "k_tile"), [(None, None), ((2, 4, 4), (2, 4, 4)), (None, (1, 4, 8)), ((4, 2, 3), None)]
)
def test_fast_paths_agree_with_keep(pattern: Pattern, grid: Grid, q_tile: Grid | None, k_tile: Grid | None) -> None:
    layout = Layout(grid)
    at = layout.coordinates()
    kept = pattern.keep(at, at, grid)
    q, k = visual_blocks(layout, q_tile, 16), visual_blocks(layout, k_tile, 32)
    some, every = pattern.cover(q, k, grid)
    masks: dict[int, torch.Tensor] = {}
    alike = pattern.alike(q, k, *some.nonzero(as_tuple=True), grid)
    for row, col in product(range(len(q)), range(len(k))):
        part = kept[q[row][q[row] >= 0]][:, k[col][k[col] >= 0]]
        assert some[row, col] or not part.any()
        assert part.all() or not every[row, col]
    if alike is not None:
        for number, (row, col) in zip(alike.tolist(), some.nonzero().tolist(), strict=True):
            mask = kept[q[row]][:, k[col]] & (q[row] >= 0)[:, None] & (k[col] >= 0)
            assert torch.equal(masks.setdefault(number, mask), mask)
    factors = pattern.factors(grid)
    if factors is not None:
        product_of_tables = torch.ones_like(kept)
        for code, table in factors:
            product_of_tables &= table[code][:, code]
        assert torch.equal(product_of_tables, kept)
    axes = pattern.axes(grid)
    if axes is not None:
        by_axis = [table[at[:, axis]][:, at[:, axis]] for axis, table in enumerate(axes)]
        assert torch.equal(by_axis[0] & by_axis[1] & by_axis[2], kept)
    many = pattern.pairs(at[:60].view(3, 20, 1, 3), at[-90:].view(3, 1, 30, 3), grid)
    one_by_one = [kept[20 * n : 20 * n + 20, len(at) - 90 + 30 * n :][:, :30] for n in range(3)]
    assert torch.equal(many, torch.stack(one_by_one))


@pytest.mark.parametrize("pattern", [Dense(), Neighborhood(window=3), Radial(), Radial(variant="code", block=16)])
def test_mask_mod_is_the_pattern_with_extra_tokens_seen(pattern) -> None:
    layout = Layout((3, 6, 7), before=2, after=3)
    tokens = torch.arange(layout.tokens)
    none = torch.tensor(0)
    kept = pattern.mask_mod(layout)(none, none, tokens[:, None], tokens[None])
    at = layout.coordinates()
    visual = slice(2, 2 + layout.visual)
    assert torch.equal(kept[visual, visual], pattern.keep(at, at, layout.grid))
    kept[visual, visual] = True
    assert kept.all()


def test_a_mask_mod_refuses_a_grid_at_once() -> None:
    with pytest.raises(ValueError, match="window: 9 with dilation 1 needs 9 tokens"):
        Neighborhood(window=9).mask_mod(Layout((3, 6, 7)))


def test_few_masks_of_the_band_are_evaluated() -> None:
    grid = (6, 16, 16)
    blocks = visual_blocks(Layout(grid), None, 32)
    rows, cols = torch.ones(len(blocks), len(blocks)).nonzero(as_tuple=True)
    alike = Radial().alike(blocks, blocks, rows, cols, grid)
    assert alike is not None
    assert len(alike.unique()) < len(alike) / 10


def test_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    draw.main("neighborhood", ["window=[1,1,3]", "--grid", "1", "1", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["███  ", " ▀██▄", "  ▀▀▀"]
    assert lines[3].endswith("density 60.0%")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["windw=3"], "did you mean 'window'"),
        (["window"], "wanted FIELD=VALUE"),
        (["window=9"], "make window * dilation at most"),
        (["--grid", "10", "100", "100"], "too many to draw"),
        (["--grid", "0", "1", "1"], "grid frames: wanted at least 1"),
    ],
)
def test_drawing_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        draw.main("neighborhood", arguments, window=3)
    assert error.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dense", "skip", "neighborhood", "radial"])
def test_pattern_files_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"visparse.patterns.{name}", "--grid", "3", "3", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "density" in done.stdout
