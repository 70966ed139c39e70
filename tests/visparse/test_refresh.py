"""Refresh as plans hold it: values, JSON, refusals, and which steps may be measured where the overlap decides."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import visparse
from visparse.compensation import Overlap, ReuseResidual, ReuseStatistics
from visparse.compensation.refresh import parse_refresh
from visparse.compensation.watch import Watch
from visparse.patterns import Neighborhood, TopK, pattern_from_dict
from visparse.plan import SparsePlan
from visparse.presets import load_plan
from visparse.schedule import DenseSteps, Timetable

RULE = Overlap(below=0.7, every=2, most=3)
JSON = {"overlap_below": 0.7, "every": 2, "most": 3}


def make(**fields):
    usual = {"name": "mine", "patterns": {"top": TopK(refresh=RULE)}, "default": "top", "dense_steps": 2}
    return SparsePlan(**usual | fields)


def test_the_json_form():
    assert RULE.to_dict() == JSON
    assert parse_refresh(JSON) == parse_refresh(RULE) == RULE
    assert parse_refresh({"overlap_below": 1}) == Overlap(below=1)
    assert visparse.Overlap is Overlap
    assert pattern_from_dict(TopK(refresh=RULE).to_dict()) == TopK(refresh=RULE)


def test_plans_round_trip():
    plan = make(statistics=ReuseStatistics(refresh=RULE), residual={"refresh": JSON})
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["patterns"]["top"]["refresh"] == data["residual"]["refresh"] == JSON
    assert SparsePlan.from_dict(data) == plan
    assert plan.overlap == RULE
    assert plan.refreshes == {"top": RULE, "statistics": RULE, "residual": RULE}
    assert make(patterns={"top": TopK(refresh=3)}).overlap is None
    assert "refresh=Overlap(below=0.7, every=2, most=3)" in plan.describe()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"overlap_belw": 0.6}, "refresh has an unknown key 'overlap_belw'; did you mean 'overlap_below'"),
        ({"every": 2}, r"refresh: lacks the key 'overlap_below', got {'every': 2}; give it a share such as 0.9"),
        ({"overlap_below": 0}, r"refresh: below: wanted a share in \(0, 1\], got 0; 0.9 is usual"),
        ({"overlap_below": 0.6, "every": 0}, "refresh: every: wanted an int >= 1, in steps, got 0; 1 looks at every"),
        ({"overlap_below": 0.6, "most": 0}, r"refresh: most: wanted an int >= 1 or None \(no limit\), got 0; leave"),
        ("often", r"refresh: wanted None .* or Overlap\(below=0.9\), got 'often'; leave it out"),
    ],
)
def test_bad_values(value, text):
    with pytest.raises(ValueError, match=text):
        parse_refresh(value)
    with pytest.raises(ValueError, match="plan: residual: " + text):
        make(residual={"refresh": value})
    with pytest.raises(ValueError, match="plan: pattern 'top': " + text):
        make(patterns={"top": {"name": "top_k", "refresh": value}})


@pytest.mark.parametrize("below", [True, -0.1, 1.5, float("nan"), "0.6"])
def test_bad_thresholds(below):
    with pytest.raises(ValueError, match="below: wanted a share in"):
        Overlap(below=below)


def test_plans_that_do_not_go_together():
    with pytest.raises(
        ValueError, match=r"plan: residual: refresh by overlap follows a selector, .* got none; give it"
    ):
        make(patterns={"near": Neighborhood(window=3)}, default="near", residual={"refresh": JSON})
    with pytest.raises(ValueError, match=r"residual: refresh by overlap follows a selector"):
        make(patterns={"top": TopK(refresh=4)}, residual={"refresh": JSON})
    with pytest.raises(
        ValueError, match=r"wanted one rule for all, got top: Overlap\(.*\), residual: Overlap\(.*equal"
    ):
        make(residual={"refresh": {"overlap_below": 0.5}})
    with pytest.raises(ValueError, match="pooled scores are computed anew at every step, got refresh=Overlap"):
        TopK(score="pooled", refresh=RULE)
    with pytest.raises(ValueError, match="top: wanted a dense step before the first sparse one"):
        make(dense_steps=0)
    make(patterns={"top": TopK(refresh=RULE)}, residual={"refresh": 4})  # each may have its own


def test_the_flagship_takes_it_as_a_whole():
    plan = load_plan("foveal").with_changes(refresh=RULE)
    assert plan.refreshes == {"foveal": RULE, "residual": RULE}
    assert plan.residual == ReuseResidual(refresh=RULE)
    assert plan.notes.endswith("changed: refresh")
    assert load_plan("foveal").with_changes(refresh=JSON) == plan
    assert load_plan("foveal").with_changes(refresh=5).refreshes == {"foveal": 5, "residual": 5}
    own = load_plan("foveal").with_changes(refresh=RULE, residual={"refresh": 5})
    assert own.refreshes == {"foveal": RULE, "residual": 5}
    apart = load_plan("foveal").with_changes(residual={"refresh": 5}).with_changes(refresh=RULE)
    assert apart.refreshes == {"foveal": RULE, "residual": 5}
    with pytest.raises(ValueError, match="unknown key 'overlap_blow'"):
        load_plan("foveal").with_changes(refresh={"overlap_blow": 0.5})


def played(table, rule, falls):
    """Steps at which a run is measured again, if the overlap falls at the steps of `falls`."""
    import torch

    watch = Watch(rule)
    for step in range(table.total):
        watch.begin_step(step, table)
        dense = table.is_dense(step) or step in watch.refreshed
        if watch.looking and not dense:
            watch.note(torch.tensor([0.0 if step in falls else 1.0]))
    return watch.refreshed


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([0, 2, 3]),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, (4,)]),
    st.integers(1, 9),
)
def test_steps_that_may_be_measured_are_those_that_some_run_measures(first, last, every, looks, most, fixed, total):
    rule = Overlap(every=looks, most=most)
    steps = DenseSteps(first=first, last=last, every=every)
    table = Timetable(steps, {"top": rule, "residual": fixed}, total)
    sparse = [step for step in range(total) if not table.is_dense(step)]
    measured = set()
    for number in range(1 << len(sparse)):
        measured |= set(played(table, rule, {step for place, step in enumerate(sparse) if number >> place & 1}))
    assert {step for step in range(total) if table.perhaps(step)} == measured
    assert all(table.perhaps(step) in ((), ("top",)) for step in range(total))
    assert all(table.is_used(step) for step in measured)


def test_the_first_measurement_is_the_schedule_s():
    plan = make(residual={"refresh": RULE})
    assert plan.measure_steps(10) == {"top": (1,), "residual": (1,)}
    table = plan.timetable(10)
    assert [step for step in range(10) if table.perhaps(step)] == [4, 6, 7, 8]
    assert table.perhaps(4) == ("top", "residual")
    assert plan.timetable(None).perhaps(4) == ()
