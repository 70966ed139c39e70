from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from visparse.layout import Grid, Layout
from visparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip
from visparse.patterns.draw import main, mask, parse_field, text
from visparse.patterns.draw_pictures import KEPT, PAPER, QUERY, TEXT, pattern_picture, stack
from visparse.patterns.draw_views import mask_cells, mask_text, middle, seen_keys, seen_text
from visparse.patterns.registry import PATTERNS


def colours(image: Image.Image) -> dict[tuple[int, ...], int]:
    found = image.getcolors(image.width * image.height)
    assert found is not None
    return {colour: count for count, colour in found}  # type: ignore[misc]


@pytest.mark.parametrize("grid", [(2, 3, 5), (1, 7, 11), (1, 1, 13)])
def test_small_masks_are_exact(grid: Grid) -> None:
    pattern = Radial()
    at = Layout(grid).coordinates()
    cells, what = mask_cells(pattern, grid, 100)
    assert torch.equal(cells, pattern.keep(at, at, grid).float())
    assert what == "pair"


def test_cells_hold_the_share_of_their_pairs() -> None:
    grid, window = (2, 8, 8), Neighborhood(window=(1, 8, 8))
    cells, what = mask_cells(window, grid, 32)
    assert what == "cell of several pairs"
    assert torch.equal(cells, torch.block_diag(torch.ones(16, 16), torch.ones(16, 16)))
    cells, _ = mask_cells(Neighborhood(window=(2, 3, 3)), grid, 32)
    assert cells.mean() == pytest.approx(9 * 2 / 128)


def test_cells_of_large_masks_are_judged_by_drawn_pairs() -> None:
    grid = (21, 45, 80)
    cells, what = mask_cells(Neighborhood(window=(7, 45, 80)), grid, 96)
    assert what == "cell of many pairs, 32 of them looked at"
    assert cells.mean() == pytest.approx(7 / 21, abs=0.01)
    assert cells[0, 0] == 1
    assert cells[0, -1] == 0
    assert torch.equal(cells, mask_cells(Neighborhood(window=(7, 45, 80)), grid, 96)[0])


@pytest.mark.parametrize("query", [(0, 0, 0), (2, 4, 6), (1, 2, 3)])
def test_seen_keys_are_a_row_of_the_mask(query: Grid) -> None:
    grid = (3, 5, 7)
    row = (query[0] * 5 + query[1]) * 7 + query[2]
    assert torch.equal(seen_keys(Radial(), grid, query).flatten(), mask(Radial(), grid)[row])


def test_a_query_outside_of_the_grid_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"query: wanted a place inside .* got \(0, 5, 0\); on the height axis use 0 to 4"
    ):
        seen_keys(Dense(), (3, 5, 7), (0, 5, 0))


def test_picture_of_a_small_mask_counts_right() -> None:
    """Every kept pair is a square of the mask, or a square of the view; text is a strip on two sides."""
    layout, window = Layout((2, 4, 6), before=12), Neighborhood(window=(1, 3, 3))
    size, scale = 480, 10
    image = pattern_picture(window, layout, (0, 1, 2), size=size)
    seen = colours(image)
    legend = 12 * 8
    assert seen[KEPT] > 48 * 9 * scale**2 + legend
    assert seen[QUERY] > 100
    strip = 120
    assert seen[TEXT] == pytest.approx((size + strip) ** 2 - size**2, rel=0.02)
    assert TEXT not in colours(pattern_picture(window, Layout((2, 4, 6)), (0, 1, 2)))
    skipped = colours(pattern_picture(Skip(), layout, (0, 1, 2)))
    assert skipped[KEPT] < 200
    assert skipped[TEXT] < 200


def test_points_of_the_picture_are_pairs_of_the_mask() -> None:
    """The mask is found by its colours: the first and the last kept pair are corners of it here."""
    grid, scale = (4, 4, 6), 4
    pattern = Radial(variant="code", block=8, sink=False)
    at = Layout(grid).coordinates()
    expected = pattern.keep(at, at, grid)
    assert expected[0, 0]
    assert expected[-1, -1]
    image = pattern_picture(pattern, Layout(grid), (0, 0, 0), size=96 * scale)
    pixels = torch.tensor(list(image.tobytes())).view(image.height, image.width, 3)
    kept = (pixels == torch.tensor(KEPT)).all(2)
    left = 24 + 34
    top = int(kept[:, left].nonzero()[0])
    inside = kept[top : top + 96 * scale, left : left + 96 * scale]
    assert torch.equal(inside, expected.repeat_interleave(scale, 0).repeat_interleave(scale, 1))


def test_picture_of_a_large_grid_and_of_one_line() -> None:
    for layout in (Layout((21, 45, 80), 0, 226), Layout((1, 1, 500)), Layout((60, 3, 3))):
        image = pattern_picture(Radial(), layout, middle(layout.grid), notes=["density 50 %"], size=128)
        assert {PAPER, KEPT, QUERY} <= set(colours(image))


def test_a_stack_holds_its_pictures() -> None:
    one, two = Image.new("RGB", (30, 10), KEPT), Image.new("RGB", (20, 15), QUERY)
    image = stack([one, two])
    assert image.size == (30, 25)
    assert image.getpixel((5, 5)) == KEPT
    assert image.getpixel((5, 20)) == QUERY
    assert image.getpixel((25, 20)) == PAPER


def test_text_drawings() -> None:
    assert text(Neighborhood(window=(1, 1, 3)), (1, 1, 4)) == "███ \n ███"
    assert mask_text(Neighborhood(window=(2, 1, 1)), (2, 1, 2)) == "██  ██  \n  ██  ██\n██  ██  \n  ██  ██"
    drawn = seen_text(Neighborhood(window=(1, 3, 3)), (2, 3, 4), (1, 0, 1)).split("\n")
    assert drawn == ["t=0 │t=1 ", "    │█Q█ ", "    │███ ", "    │███ "]
    wide = seen_text(Dense(), (9, 45, 80), (8, 44, 79), columns=60).split("\n")
    assert max(map(len, wide)) <= 60
    assert wide[0].split("│")[-1].strip() == "t=8"
    assert wide[-1].endswith("Q")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("window=3", ("window", 3)),
        ("window=[3,5,5]", ("window", [3, 5, 5])),
        ("window=3x5x5", ("window", [3, 5, 5])),
        ("window=3,5,5", ("window", [3, 5, 5])),
        ("variant=code", ("variant", "code")),
        ("sink=false", ("sink", False)),
    ],
)
def test_fields(given: str, wanted: tuple) -> None:
    assert parse_field(given) == wanted


@pytest.mark.parametrize("given", ["window", "=3"])
def test_a_bad_field_is_an_error(given: str) -> None:
    with pytest.raises(ValueError, match=f"{given}: wanted FIELD=VALUE, for example window=3"):
        parse_field(given)


def test_command_of_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("radial", ["--grid", "2", "3", "4"])
    density = mask(Radial(), (2, 3, 4)).float().mean().item()
    assert capsys.readouterr().out.endswith(f"on (2, 3, 4): density {density:.1%}\n")
    main("neighborhood", ["window=1,3,3", "--out", str(tmp_path / "mask.png")], stride=1)
    assert "density 9.4%" in capsys.readouterr().out
    assert Image.open(tmp_path / "mask.png").width > 480
    with pytest.raises(SystemExit):
        main("neighborhood", ["window=9"])
    assert "window: 9 with dilation 1 needs 9 tokens on the frames axis" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("radial", ["--grid", "20", "30", "40"])
    assert "24000 tokens are too many to draw" in capsys.readouterr().err


def fits(pattern: Pattern, grid: Grid) -> bool:
    try:
        pattern.pairs(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), grid)
    except ValueError:
        return False
    return True


def test_registered_patterns_that_need_no_parameters_can_be_drawn() -> None:
    layout, drawn = Layout((18, 24, 24), 3), set()
    for name, cls in PATTERNS.items():
        if all(field.default is not MISSING for field in fields(cls)) and fits(cls(), layout.grid):
            assert pattern_picture(cls(), layout, (3, 4, 4), size=96).width > 96
            drawn.add(name)
    assert {"dense", "skip", "radial"} <= drawn
