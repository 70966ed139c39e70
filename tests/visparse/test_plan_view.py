"""A plan laid out: cells, ids, counts, costs; and its text."""

import pytest

from visparse.patterns import Dense, Neighborhood, PerHead, Skip, SpatialHead, TopK
from visparse.plan import SparsePlan
from visparse.plan_view import LayerCost, head_tables, layer_costs, shape_for, view_plan
from visparse.plan_view_text import plan_text
from visparse.presets import load_plan
from visparse.rules import ModelFingerprint

SHAPE = ModelFingerprint(model_class="Wan", layers=3, heads=4, head_dim=64)


def make(**changes):
    values = {
        "name": "mine",
        "patterns": {
            "dense": Dense(),
            "near": Neighborhood(window=(3, 5, 5)),
            "mixed": PerHead(patterns=(Skip(), SpatialHead(width=1)), cycle=True),
            "top": TopK(),
        },
        "default": "near",
        "assignment": [
            {"pattern": "dense", "layers": 1, "heads": 3},
            {"pattern": "mixed", "layers": 1, "heads": "0:2"},
            {"pattern": "top", "layers": 2, "steps": "10:"},
        ],
        "dense_steps": 0.25,
        "dense_layers": 1,
        "residual": {},
        "model": SHAPE,
        "made_for": (5, 16, 16),
        "notes": "by hand",
        "measured": {
            "device": "a GPU",
            "gap": {"bound": 0.5},
            "layers": [{"layer": 1, "error": 0.25, "milliseconds": 4.0}, {"layer": 0, "error": 0.5}],
        },
    }
    return SparsePlan(**{**values, **changes})


def test_cells_of_all_stretches():
    early, late = head_tables(make(), SHAPE)
    assert (early.first, early.stop, early.steps, early.words) == (0, 10, "0:10", "steps 0 to 9")
    assert (late.first, late.stop, late.steps, late.words) == (10, None, "10:", "steps from 10 on")
    dense = (None,) * 4
    assert early.cells == (dense, ("mixed[0]", "mixed[1]", "near", None), ("near",) * 4)
    assert late.cells == (dense, early.cells[1], ("top",) * 4)


def test_stretches_with_equal_cells_are_one_unless_marked():
    rules = [{"pattern": "near", "steps": "3:5"}, {"pattern": "near", "steps": 7}]
    (table,) = head_tables(make(assignment=rules), SHAPE)
    assert (table.steps, table.words) == ("all", "all steps")
    marked = head_tables(make(assignment=rules), SHAPE, frozenset({4}))
    assert [table.steps for table in marked] == ["0:3", "3:4", "4:5", "5:7", "7:8", "8:"]
    assert marked[4].words == "step 7"


def test_ids_and_counts():
    view = view_plan(make(), SHAPE)
    wanted = {"dense": ".", "near": "a", "mixed": "b", "top": "c", "mixed[0]": "d", "mixed[1]": "e"}
    assert view.ids == wanted
    assert view.heads == {"mixed[0]": 1, "mixed[1]": 1, "near": 1, "top": 4}
    data = view.to_dict()
    assert data["tables"][0] == {"steps": "0:10", "ids": [list("...."), list("dea."), list("aaaa")]}
    assert SparsePlan.from_dict(data["plan"]) == make()


def test_short_names_are_their_own_ids():
    pattern = Skip()
    assert view_plan(make(patterns={"n1": pattern, "x": pattern}, default="n1", assignment=[]), SHAPE).ids == {
        "n1": "n1",
        "x": "x",
    }
    odd = view_plan(make(patterns={".": pattern, "x": pattern}, default="x", assignment=[]), SHAPE)
    assert odd.ids == {".": "a", "x": "b"}
    many = view_plan(
        make(patterns={f"name {i}": pattern for i in range(60)}, default="name 0", assignment=[]), SHAPE
    ).ids
    assert (many["name 0"], many["name 51"], many["name 52"]) == ("a", "Z", "a1")
    assert len(set(many.values())) == 60


def test_costs():
    assert layer_costs(make().measured) == (
        LayerCost(layer=0, error=0.5, milliseconds=None),
        LayerCost(layer=1, error=0.25, milliseconds=4.0),
    )
    short = {"layers": {"1": [0.25, 4.0], "0": [0.5, None]}}  # as a search writes it
    assert layer_costs(short) == layer_costs(make().measured)
    for odd in (
        {},
        {"layers": {"0": [0.5, 1.0], "x": [0.5, 1.0]}},
        {"layers": {"0": [0.5]}},
        {"layers": {"0": ["x", 1.0]}},
        {"layers": 8},
        {"layers": [1]},
        {"layers": [{"error": 1}]},
        {"layers": [{"layer": 0, "error": "x"}]},
        {"layers": [{"layer": 0, "error": -1}]},
        {"layers": [{"layer": 0, "milliseconds": float("nan")}]},
    ):
        assert layer_costs(odd) == ()


def test_shapes():
    assert shape_for(make()) == SHAPE
    assert shape_for(load_plan("radial")) is None
    found = shape_for(load_plan("radial"), layers=2, heads=3)
    assert found == ModelFingerprint(model_class="any", layers=2, heads=3, head_dim=64)
    with pytest.raises(ValueError, match="another model: heads 4, this model has 5"):
        shape_for(make(), heads=5)
    with pytest.raises(
        ValueError, match="plan 'radial' is for any model, so layers and heads go together; give --heads"
    ):
        shape_for(load_plan("radial"), layers=2)
    with pytest.raises(ValueError, match="rule 2 names layer 2, this model has 2 layers"):
        shape_for(make(model=None), layers=2, heads=4)


def test_text():
    lines = plan_text(view_plan(make(), SHAPE)).split("\n")
    assert lines[0] == "plan 'mine', schema 1"
    assert "  model         Wan, 3 layers of 4 heads of 64" in lines
    assert "  lengths       in tokens are for 5x16x16, and are rescaled to other grids" in lines
    assert "  dense steps   first 25% of the steps" in lines
    assert "  dense layers  first 1" in lines
    assert any(line.startswith("  residual      ReuseResidual(") for line in lines)
    assert "  notes         by hand" in lines
    squeezed = [" ".join(line.split()) for line in lines]
    assert ". dense 5 dense()" in squeezed
    assert "a near 1 neighborhood(window=[3, 5, 5], stride=1, dilation=1, causal=False)" in squeezed
    start = lines.index("layers down, heads across, steps 0 to 9 (what the schedule makes dense aside)")
    assert lines[start + 1 : start + 5] == [
        "layer   0 1 2 3",
        "    0   . . . .",
        "    1   d e a .",
        "    2   a a a a",
    ]
    assert 'gap {"bound": 0.5}' in squeezed
    assert "layers" not in [line.split(" ")[0] for line in squeezed[squeezed.index("measured") :]]
    assert f"0 0.5 {'█' * 24} -" in squeezed
    assert f"1 0.25 {'█' * 12} 4 {'█' * 24}" in squeezed


def test_text_of_a_preset_and_of_a_wide_plan():
    text = plan_text(view_plan(load_plan("foveal"), None))
    assert "The plan is for any model; layers and heads (--layers, --heads) draw who has which pattern." in text
    wide = SparsePlan(name="w", patterns={"n12": Skip()}, default="n12", dense_layers=[1])
    text = plan_text(view_plan(wide, shape_for(wide, layers=2, heads=12)))
    assert "layer     0                   5                  10\n    0   n12 n12" in text
    assert "\n    1     .   .   ." in text
    assert ". 12 dense layers" in [" ".join(line.split()) for line in text.split("\n")]


def test_what_a_search_tried():
    tried = [
        {"dense_steps": 2, "refresh": 0.6, "attention": 0.25, "output_error": 0.0625},
        {"dense_steps": 5, "refresh": None, "attention": -0.1, "why_not": "beyond the ceiling"},
        {"dense_steps": 3, "refresh": None, "attention": 0.125, "output_error": 0.03125},
        {"dense_steps": 4, "refresh": None, "attention": 0.1, "output_error": None},
    ]
    measured = {"layers": {"0": [0.5, 1.0], "2": [0.25, 4.0]}, "schedules": tried, "weights": [[2.0, 1.0], [0.5, 4.0]]}
    text = plan_text(view_plan(make(measured=measured), SHAPE))
    assert text.endswith(
        """schedules that were tried, all at the goal's speed-up
  dense steps  refresh  attention  error of the output
            3    never      12.5%  0.03125
            2      0.6      25.0%  0.0625
            5    never     -10.0%  beyond the ceiling
            4    never      10.0%  not judged

what an error of a layer weighs in the output, the most 1
  layer  range 1  range 2
      0      0.5  0.125
      2     0.25  1

  layer     error                                  ms
      0       0.5  ████████████████████████         1  ██████
      2      0.25  ████████████                     4  ████████████████████████"""
    )
    assert "range" not in plan_text(view_plan(make(measured={**measured, "weights": [[2.0, 1.0]]}), SHAPE))
    for odd in ({"schedules": "none"}, {"weights": [[1.0]]}, {"weights": [["a", "b"]]}, {"weights": [[0.0, 0.0]]}):
        shown = plan_text(view_plan(make(measured={**measured, "weights": [], "schedules": [], **odd}), SHAPE))
        assert f"  {next(iter(odd))} " in shown.partition("measured")[2]
