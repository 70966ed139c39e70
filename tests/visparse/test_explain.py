"""Explain: what happens at each step, and the times that follow from measured rates."""

import json
from dataclasses import replace

import pytest

from visparse.estimates import estimate
from visparse.explain import explain
from visparse.explain_costs import LOOK_SHARE, PROXIES_SHARE, SCORES_SHARE
from visparse.layout import Layout
from visparse.patterns import Dense, Neighborhood, TopK, TopP
from visparse.plan import SparsePlan
from visparse.presets import load_plan
from visparse.rules import ModelFingerprint

MODEL = ModelFingerprint(model_class="W", layers=4, heads=2, head_dim=64)
LAYOUT = Layout((5, 16, 16))
NEAR = Neighborhood(window=3)
DENSE = estimate(Dense(), LAYOUT, head_dim=64, heads=2 * 4).dense_milliseconds


def make(**fields):
    return SparsePlan(**{"name": "mine", "patterns": {"near": NEAR, "top": TopK()}, "default": "near"} | fields)


def spans(found):
    return [(s.first, s.last, str(s)) for s in found.stretches]


def test_static_plans():
    found = explain(make(dense_steps={"first": 2, "last": 1}, dense_layers=1), MODEL, LAYOUT, 10)
    assert spans(found) == [(0, 1, "dense"), (2, 8, "sparse: near"), (9, 9, "dense")]
    one = estimate(NEAR, LAYOUT, head_dim=64, heads=2 * 3)
    sparse = found.stretches[1]
    assert sparse.block_density == pytest.approx(((1 + 3 * one.block_density) / 4,) * 2)
    assert sparse.milliseconds == pytest.approx((one.milliseconds + DENSE / 4,) * 2)
    assert found.dense_milliseconds == pytest.approx(DENSE)
    assert found.milliseconds == pytest.approx((3 * DENSE + 7 * sparse.milliseconds[0],) * 2)
    assert found.speedup == pytest.approx((10 * DENSE / found.milliseconds[0],) * 2)


def test_measurements_and_what_they_add():
    plan = make(default="top", dense_steps=2, residual={"refresh": [6]}, statistics={}, proxies={}, dense_layers=[0])
    found = explain(plan, MODEL, LAYOUT, 9)
    assert spans(found) == [
        (0, 0, "dense"),
        (1, 1, "dense, measured (top, statistics, residual)"),
        (2, 5, "sparse: top"),
        (6, 6, "dense, measured (residual)"),
        (7, 8, "sparse: top"),
    ]
    group, rate = estimate(Dense(), LAYOUT, head_dim=64, heads=1).groups[0], found.stretches
    measured = estimate(Dense(), LAYOUT, head_dim=64, heads=1).rate
    eighth = measured.milliseconds(group.query_blocks, group.full / 8, group.masked / 8) * 2 * 3
    passes = eighth + PROXIES_SHARE * DENSE * 3 / 4
    assert rate[2].milliseconds == pytest.approx((passes + DENSE / 4,) * 2)
    assert rate[2].block_density == pytest.approx((0.25 + 0.75 / 8,) * 2)
    assert rate[3].milliseconds == pytest.approx((DENSE + passes,) * 2)
    assert rate[1].milliseconds == pytest.approx((DENSE + passes + SCORES_SHARE * DENSE * 3 / 4,) * 2)
    again = explain(make(default="top", dense_steps=2), MODEL, LAYOUT, 9).stretches
    assert str(again[1]) == "dense, measured (top)"
    assert again[1].milliseconds == pytest.approx((DENSE * (1 + SCORES_SHARE),) * 2)


def test_steps_that_may_be_measured_again():
    rule = {"overlap_below": 0.6, "every": 2}
    top = TopK(refresh=rule)
    plan = make(patterns={"top": top}, default="top", dense_steps={"first": 2, "last": 2}, residual={"refresh": rule})
    found = explain(plan, MODEL, LAYOUT, 9)
    assert spans(found) == [
        (0, 0, "dense"),
        (1, 1, "dense, measured (top, residual)"),
        (2, 3, "sparse: top"),
        (4, 4, "sparse: top; may be measured (top, residual)"),
        (5, 6, "sparse: top"),
        (7, 8, "dense"),
    ]
    usual = explain(replace(plan, patterns={"top": TopK()}, residual={}), MODEL, LAYOUT, 9)
    sparse, measured = usual.stretches[2].milliseconds[0], usual.stretches[1].milliseconds[0]
    look = DENSE * LOOK_SHARE / 2
    assert found.stretches[3].milliseconds == pytest.approx((sparse + look,) * 2)
    assert found.refresh_milliseconds == pytest.approx((measured - sparse - look,) * 2)
    assert found.milliseconds[0] == pytest.approx(usual.milliseconds[0] + 4 * look + measured - sparse)
    assert found.notes == (
        "where the overlap falls below 0.6, the next step is measured again; the time of the run counts one such step",
    )
    assert found.notes[0] in str(found)
    data = found.to_dict()
    assert data["refresh_milliseconds"] == list(found.refresh_milliseconds)
    assert data["stretches"][3]["perhaps"] == ["top", "residual"]
    assert (usual.refresh_milliseconds, usual.notes) == (None, ())
    unknown = explain(plan, MODEL, LAYOUT, 9, device="abacus")
    assert (unknown.refresh_milliseconds, unknown.milliseconds) == (None, None)
    short = explain(plan, MODEL, LAYOUT, 6)  # no sparse step would come after a refresh
    assert (short.refresh_milliseconds, short.notes) == (None, ())


def test_bounds_of_a_share_of_the_mass():
    plan = make(patterns={"p": TopP(least=0.05, most=0.2, score="pooled")}, default="p")
    found = explain(plan, MODEL, LAYOUT, 4)
    assert spans(found) == [(0, 3, "sparse: p")]
    assert found.stretches[0].block_density == (0.05, 0.2)
    least, most = found.stretches[0].milliseconds
    assert least < most
    assert found.speedup[0] < found.speedup[1]
    assert "5.0% to 20.0%" in str(found)


def test_rules_split_stretches():
    plan = make(dense_steps=1, assignment=[{"pattern": "top", "heads": 0, "steps": "3:5"}])
    assert spans(explain(plan, MODEL, LAYOUT, 7)) == [
        (0, 0, "dense, measured (top)"),
        (1, 2, "sparse: near"),
        (3, 4, "sparse: top, near"),
        (5, 6, "sparse: near"),
    ]


def test_the_table_and_json():
    found = explain(load_plan("radial"), MODEL, LAYOUT, 50)
    lines = str(found).split("\n")
    assert lines[0] == "plan 'radial' on 5x16x16 = 1280 tokens, 50 steps, cpu; 4 layers of 2 heads of 64"
    assert lines[1].split() == ["steps", "what", "happens", "blocks", "ms", "a", "step"]
    assert lines[2].split()[:3] == ["0-11", "dense", "100.0%"]
    assert lines[3].split()[:3] == ["12-49", "sparse:", "radial"]
    assert "times faster" in lines[4]
    assert "1280 tokens are outside of what was measured" in lines[5]
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["steps"], data["grid"], data["stretches"][1]["what"]) == (50, [5, 16, 16], "sparse: radial")
    assert data["milliseconds"] == list(found.milliseconds)
    assert data["speedup"] == list(found.speedup)


def test_a_device_that_was_not_measured():
    found = explain(make(dense_steps=1, residual={}), MODEL, LAYOUT, 5, device="abacus")
    assert [s.milliseconds for s in found.stretches] == [None, None]
    assert (found.dense_milliseconds, found.milliseconds, found.speedup) == (None, None, None)
    assert "times: not measured: abacus with head_dim 64" in str(found)
    assert found.stretches[1].block_density[0] < 1


def test_plans_that_run_all_dense_say_why():
    assert explain(make(dense_steps=5), MODEL, LAYOUT, 5).notes == (
        "all 5 steps are dense by the plan's schedule (first 5 steps); use fewer dense steps",
    )
    found = explain(make(grids=[[1, 2, 3]]), MODEL, LAYOUT, 5)
    assert spans(found) == [(0, 4, "dense")]
    assert "note: grid (5, 16, 16) is not one of the plan's grids, so all runs dense" in str(found)
    assert found.speedup == (1.0, 1.0)


def test_noise_levels():
    plan = make(dense_steps={"sigma_above": 0.5})
    assert spans(explain(plan, MODEL, LAYOUT, 3, sigmas=(1.0, 0.5, 0.4))) == [(0, 1, "dense"), (2, 2, "sparse: near")]
    with pytest.raises(ValueError, match=r"sigma_above=0.5 needs the noise level of each step"):
        explain(plan, MODEL, LAYOUT, 3)
    with pytest.raises(ValueError, match="sigmas: wanted 3, one for each step, got 2"):
        explain(plan, MODEL, LAYOUT, 3, sigmas=(1.0, 0.5))


def test_refusals():
    with pytest.raises(ValueError, match="steps: wanted an int of at least 1, got 0; 50 is usual"):
        explain(make(), MODEL, LAYOUT, 0)
    with pytest.raises(ValueError, match="another model: layers 2, this model has 4"):
        explain(make(model=ModelFingerprint(model_class="W", layers=2, heads=2, head_dim=64)), MODEL, LAYOUT, 4)
    with pytest.raises(ValueError, match="got none in a run of 4 steps"):
        explain(make(dense_steps=0.1, residual={}), MODEL, LAYOUT, 4)
