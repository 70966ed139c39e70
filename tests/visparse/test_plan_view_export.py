"""Plans resolved for one grid, and their rows."""

import csv
import io
import json

import pytest

from visparse.patterns import Neighborhood, PerHead, Skip, TopP
from visparse.plan import SparsePlan
from visparse.plan_view_export import COLUMNS, assignment_rows, resolved_plan, rows_csv
from visparse.presets import PRESETS
from visparse.rules import ModelFingerprint

GRID = (4, 16, 24)
SHAPE = ModelFingerprint(model_class="Wan", layers=2, heads=2, head_dim=64)


def make(**changes):
    patterns = {
        "share": {"name": "neighborhood", "window": ["50%/1", "50%/8", "30%/8"]},
        "mix": PerHead(patterns=(Skip(), Neighborhood(window=(2, 4, 4)))),
        "some": TopP(least=0.1, most=0.5),
    }
    rules = [{"pattern": "mix", "layers": 1}, {"pattern": "some", "layers": 0, "heads": 1, "steps": "6:"}]
    values = {"patterns": patterns, "default": "share", "assignment": rules, "dense_steps": 2, "model": SHAPE}
    return SparsePlan(**{"name": "mine", "made_for": (4, 8, 8), **values, **changes})


@pytest.mark.parametrize("plan", [make(), make(made_for=None), *(preset() for preset in PRESETS.values())])
def test_a_resolved_plan_does_the_same(plan):
    found = resolved_plan(plan, GRID)
    assert found.made_for == GRID
    assert "%" not in json.dumps(found.to_dict()["patterns"])
    for name, template in plan.patterns.items():
        parts = [f"{name}[{i}]" for i in range(2)] if template.per_head else [name]
        for part in parts:
            assert found.patterns[part].resolve(GRID) == plan.patterns[part].resolve(GRID)
    again = SparsePlan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert found.notes.endswith("resolved for grid 4x16x24")
    assert (found.assignment, found.dense_steps, found.model) == (plan.assignment, plan.dense_steps, plan.model)


def test_lengths():
    found = resolved_plan(make(), GRID).to_dict()["patterns"]
    assert found["share"]["window"] == [2, 8, 8]
    assert found["mix"]["patterns"][1]["window"] == [2, 8, 12]


def test_rows():
    rows = assignment_rows(make(), SHAPE, GRID)
    assert [(row["layer"], row["head"], row["steps"], row["pattern"]) for row in rows] == [
        *((0, head, "0:6", "neighborhood") for head in (0, 1)),
        (1, 0, "0:6", "skip"),
        (1, 1, "0:6", "neighborhood"),
        (0, 0, "6:", "neighborhood"),
        (0, 1, "6:", "top_p"),
        (1, 0, "6:", "skip"),
        (1, 1, "6:", "neighborhood"),
    ]
    assert rows[0]["parameters"]["window"] == [2, 8, 8]
    assert (rows[5]["block_density"], rows[5]["block_density_most"]) == (0.1, 0.5)
    assert 0 < rows[0]["block_density"] == rows[0]["block_density_most"] < 1
    read = list(csv.DictReader(io.StringIO(rows_csv(rows))))
    assert tuple(read[0]) == COLUMNS
    assert [json.loads(row["parameters"]) for row in read] == [row["parameters"] for row in rows]
    assert [int(row["head"]) for row in read] == [row["head"] for row in rows]


def test_dense_heads_have_rows_too():
    row = assignment_rows(make(dense_layers=1), SHAPE, GRID)[0]
    assert list(row.values()) == [0, 0, "all", "dense", {}, 1.0, 1.0]


def test_grids_that_do_not_go():
    with pytest.raises(
        ValueError, match=r"grid: wanted one of the plan's grids \(4x8x8\), got 4x16x24, where all runs"
    ):
        resolved_plan(make(grids=[(4, 8, 8)]), GRID)
    plan = make(made_for=None)
    with pytest.raises(ValueError, match="pattern 'mix' on grid 1x16x24: window: 2 with dilation 1 needs 2 tokens"):
        resolved_plan(plan, (1, 16, 24))
