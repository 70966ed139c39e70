"""What differs between two plans."""

import json
from dataclasses import replace

import pytest

from visparse.patterns import Neighborhood, Skip
from visparse.plan import SparsePlan
from visparse.plan_view_diff import heads_text, plan_changes
from visparse.presets import PRESETS
from visparse.rules import ModelFingerprint

SHAPE = ModelFingerprint(model_class="Wan", layers=4, heads=4, head_dim=64)
NEAR, FAR = Neighborhood(window=(3, 5, 5)), Neighborhood(window=(3, 9, 9))
PLAN = SparsePlan(name="a", patterns={"near": NEAR, "far": FAR}, default="near", model=SHAPE)


def changed(**changes):
    return plan_changes(PLAN, replace(PLAN, **changes))


def test_equal_plans():
    assert plan_changes(PLAN, SparsePlan.from_dict(json.loads(json.dumps(PLAN.to_dict())))) == []
    for preset in PRESETS.values():
        assert plan_changes(preset(), preset()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"name": "b"}, "name: 'a' -> 'b'"),
        ({"notes": "x"}, "notes: '' -> 'x'"),
        ({"model": None}, "model: Wan, 4 layers of 4 heads of 64 -> any"),
        ({"grids": ((5, 16, 16), (1, 8, 8))}, "grids: any -> 5x16x16, 1x8x8"),
        ({"made_for": (5, 16, 16)}, "made for: none -> 5x16x16"),
        ({"dense_steps": 0.25}, "dense steps: none -> first 25% of the steps"),
        ({"dense_steps": {"first": 0}}, "dense steps: 0 -> {"),
        ({"proxies": {}}, "proxies: None -> Proxies("),
        ({"statistics": {}, "dense_steps": 1}, "statistics: None -> ReuseStatistics("),
        ({"residual": {}, "dense_steps": 1}, "residual: None -> ReuseResidual("),
        ({"measured": {"psnr": 1, "n": None}}, "measured: differs in psnr, n"),
    ],
)
def test_header(changes, line):
    lines = changed(**changes)
    assert len(lines) == len(changes)
    assert any(one.startswith(line) for one in lines)


def test_another_form_of_the_same():
    (line,) = changed(dense_steps={"first": 0})
    assert line.endswith("which means the same")
    (line,) = changed(assignment=[{"pattern": "near", "layers": "0:2"}])
    assert line == "default and rules: written differently, with the same pattern for every head at every step"


def test_dense_layers_change_heads_too():
    assert changed(dense_layers=1) == [
        "dense layers: none -> first 1",
        "4 of 16 heads, all steps: near -> dense: layer 0: heads 0-3",
    ]


def test_patterns():
    lines = changed(patterns={"near": NEAR, "far": Skip(), "new": Skip()})
    assert lines == [f"pattern changed: far: {PLAN.patterns['far']} -> skip()", "pattern added: new: skip()"]
    (line,) = changed(patterns={"near": NEAR})
    assert line.startswith("pattern removed: far: neighborhood(window=[3, 9, 9]")


def test_a_pattern_that_changes_changes_its_heads():
    line = changed(patterns={"near": Skip(), "far": FAR})[-1]
    assert line == "16 of 16 heads, all steps: near -> near, which has changed: layers 0-3: heads 0-3"


def test_another_name_for_the_same_pattern_changes_no_head():
    lines = changed(patterns={"close": NEAR, "far": FAR}, default="close")
    assert [line.split(":")[0] for line in lines] == ["pattern removed", "pattern added", "default and rules"]


def test_heads_and_steps():
    rules = [
        {"pattern": "far", "layers": [1, 2], "heads": [0, 2, 3]},
        {"pattern": "far", "layers": 3, "heads": 1},
        {"pattern": "far", "layers": 0, "heads": 1, "steps": "5:9"},
        {"pattern": "far", "layers": 0, "heads": 1, "steps": "9:12"},
        {"pattern": "far", "layers": 0, "heads": 1, "steps": 20},
    ]
    assert changed(assignment=rules) == [
        "1 of 16 heads, steps 5 to 11, step 20: near -> far: layer 0: head 1",
        "7 of 16 heads, all steps: near -> far: layers 1-2: heads 0, 2-3; layer 3: head 1",
    ]


def test_without_a_shape_rules_are_compared():
    one = replace(PLAN, model=None, assignment=[{"pattern": "far", "layers": 1}, {"pattern": "far", "layers": 2}])
    two = replace(one, default="far", assignment=[{"pattern": "far", "layers": 1}, {"pattern": "far", "heads": 2}])
    default, removed, added = plan_changes(one, two)
    assert default == "default: near -> far"
    assert removed.startswith("rule removed: {")
    assert '"layers": 2' in removed
    assert added.startswith("rule added: {")
    assert '"heads": 2' in added
    turned = replace(one, assignment=one.assignment[::-1])
    assert plan_changes(one, turned) == ["rules: in another order, or repeated"]
    assert plan_changes(one, two, SHAPE) == ["8 of 16 heads, all steps: near -> far: layers 0, 3: heads 0-3"]


def test_models_of_other_sizes_have_no_heads_in_common():
    other = replace(PLAN, model=replace(SHAPE, layers=5), default="far")
    assert plan_changes(PLAN, other) == [
        "model: Wan, 4 layers of 4 heads of 64 -> Wan, 5 layers of 4 heads of 64",
        "default: near -> far",
    ]


def test_heads_text():
    assert heads_text([(2, 0), (2, 3), (2, 4), (3, 0), (3, 3), (3, 4), (7, 1)]) == (
        "layers 2-3: heads 0, 3-4; layer 7: head 1"
    )
