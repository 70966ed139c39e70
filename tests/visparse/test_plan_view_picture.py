"""The picture of a plan: every cell has the colour of its pattern, bars are as long as their figures."""

from dataclasses import replace

import pytest

from visparse.patterns import Neighborhood, Skip, Window
from visparse.patterns.draw_pictures import HIDDEN
from visparse.plan import SparsePlan
from visparse.plan_view import shape_for, view_plan
from visparse.plan_view_picture import _DENSE, _PALETTE, plan_picture
from visparse.presets import load_plan

PATTERNS = {"near": Neighborhood(window=3), "off": Skip(), "wide": Window(window=4)}


def make(**changes):
    rules = [{"pattern": "off", "layers": 1, "heads": 0}, {"pattern": "wide", "layers": 1, "heads": 1}]
    plan = SparsePlan(name="mine", patterns=PATTERNS, default="near", assignment=rules, dense_layers=1)
    return replace(plan, **changes)


def draw(plan, layers, heads):
    return plan_picture(view_plan(plan, shape_for(plan, layers=layers, heads=heads)))


def area(image, colour, box=None):
    data = (image if box is None else image.crop(box)).tobytes()
    return sum(data[i : i + 3] == bytes(colour) for i in range(0, len(data), 3))


def test_colours_of_cells():
    plain, mixed = draw(make(assignment=()), 20, 20), draw(make(), 20, 20)
    cell = 18 * 18  # 20 x 20 pixels without its border, less what the id covers
    for colour, cells in ((_DENSE, 20), (_PALETTE[0], 380)):
        assert 0.7 < area(plain, colour) / cells / cell < 1.2
    assert _PALETTE[1] not in [pixel for _, pixel in plain.getcolors(1 << 20)]
    assert area(mixed, _PALETTE[1]) > 0.5 * cell
    assert area(mixed, HIDDEN) > 0.5 * cell
    assert area(mixed, _PALETTE[0]) < area(plain, _PALETTE[0])
    assert plain.size[0] == mixed.size[0]


def test_bars():
    bare = draw(make(), 20, 20)
    layers = [{"layer": layer, "error": float(layer == 3), "milliseconds": 2.0} for layer in range(20)]
    costly = draw(make(measured={"layers": layers}), 20, 20)
    assert costly.size[0] > bare.size[0]
    box = (480, 0, *costly.size)  # beside the table, which has 20 cells of 20 pixels
    error, time = area(costly, _PALETTE[3], box), area(costly, _PALETTE[0], box)
    assert error > 0
    assert 15 < time / error < 22


def test_many_patterns_have_colours_of_their_own():
    patterns = {f"n{i}": Neighborhood(window=(1, 3, 3 + i)) for i in range(16)}
    rules = [{"pattern": name, "layers": layer} for layer, name in enumerate(patterns)]
    image = draw(SparsePlan(name="many", patterns=patterns, default="n0", assignment=rules), 16, 4)
    large = [colour for count, colour in image.getcolors(1 << 20) if count > 400]
    assert len(large) >= 17  # and paper


def test_more_stretches_of_steps_are_more_tables():
    rules = [{"pattern": "wide", "steps": f"{step}:{step + 1}"} for step in (2, 4, 6)]
    one, many = draw(make(), 20, 20), draw(make(assignment=rules), 20, 20)
    assert many.size[0] > one.size[0]
    assert many.size[1] > 2 * one.size[1] * 0.9


def test_without_a_shape():
    with pytest.raises(ValueError, match="picture: wanted a number of layers and heads, and plan 'radial' is for any"):
        plan_picture(view_plan(load_plan("radial"), None))
