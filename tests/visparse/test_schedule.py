"""Schedules: dense steps by place and noise level, measurements and their refreshes, every refusal with its text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visparse.compensation import Proxies, ReuseResidual, ReuseStatistics
from visparse.patterns import Neighborhood, PerHead, TopK, TopP, Union
from visparse.plan import SparsePlan
from visparse.schedule import DenseSteps, MissingSigmasError, Timetable

NEAR = Neighborhood(window=3)


def make(**fields):
    return SparsePlan(**{"name": "mine", "patterns": {"near": NEAR, "top": TopK()}, "default": "near"} | fields)


def dense(steps, total, sigmas=None):
    table = Timetable(DenseSteps.from_value(steps), {}, total, sigmas)
    return [step for step in range(total) if table.scheduled(step)]


@pytest.mark.parametrize(
    ("steps", "total", "wanted"),
    [
        (3, 8, [0, 1, 2]),
        (0.25, 8, [0, 1]),
        ({"first": 2, "last": 1}, 8, [0, 1, 7]),
        ({"first": 2, "last": 0.25}, 8, [0, 1, 6, 7]),
        ({"first": 2, "every": 3}, 12, [0, 1, 4, 7, 10]),
        ({"every": 2}, 6, [1, 3, 5]),
        ({"first": 5, "last": 5}, 4, [0, 1, 2, 3]),
        ({}, 4, []),
        ({"first": 1}, 4, [0]),
    ],
)
def test_dense_steps(steps, total, wanted):
    assert dense(steps, total) == wanted


def test_dense_steps_by_noise_level():
    sigmas = (1.0, 0.9, 0.7, 0.4, 0.1)
    assert dense({"sigma_above": 0.7}, 5, sigmas) == [0, 1, 2]
    assert dense({"sigma_above": 0.7, "every": 2}, 5, sigmas) == [0, 1, 2, 4]
    assert dense({"sigma_above": 2.0, "last": 1}, 5, sigmas) == [4]


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 2, 3, 5]), st.integers(1, 20))
def test_the_three_kinds_against_their_definitions(first, last, every, total):
    found = dense({"first": first, "last": last, "every": every}, total)
    start = next((s for s in range(total) if s >= first and s < total - last), total)
    wanted = {s for s in range(total) if s < first or s >= total - last}
    wanted |= {start - 1 + n * every for n in range(1, total + 1)} if every else set()
    assert found == sorted(s for s in wanted if s < total)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"first": -1}, "dense_steps: first: wanted a number of steps .* got -1"),
        ({"last": 1.0}, "dense_steps: last: wanted .* share .* got 1.0"),
        ({"every": 1}, "dense_steps: every: wanted an int >= 2 .* got 1; use the plan 'dense'"),
        ({"sigma_above": 0}, "dense_steps: sigma_above: wanted a noise level above 0 or None, got 0"),
        ({"sigma_above": float("nan")}, "sigma_above: wanted a noise level above 0"),
        ({"frist": 1}, "dense_steps has an unknown key 'frist'; did you mean 'first'"),
        (True, r"dense_steps must be a number of steps .* object such as {'first': 2, 'last': 1}, got True"),
        ("3", "dense_steps must be a number of steps .* got '3'"),
    ],
)
def test_bad_dense_steps(value, text):
    with pytest.raises(ValueError, match=text):
        make(dense_steps=value)


def test_what_needs_the_run():
    with pytest.raises(ValueError, match=r"dense_steps: last=2 is counted from the end of the run.*dense_steps=3"):
        make(dense_steps={"last": 2}).stage(0, None)
    with pytest.raises(ValueError, match=r"dense_steps=0.5 is a share of the run's steps"):
        make(dense_steps={"first": 0.5}).check_run(None)
    with pytest.raises(MissingSigmasError, match=r"sigma_above=0.7 needs the noise level of each step.*use 'first'"):
        make(dense_steps={"sigma_above": 0.7}).check_run(10)
    with pytest.raises(ValueError, match=r"refresh=0.5 is a share of the run's steps"):
        make(dense_steps=1, residual={"refresh": 0.5}).is_measure_step(3, None)


@pytest.mark.parametrize(
    "steps",
    [3, 0.25, {"first": 3}, DenseSteps(first=0.1, last=2, every=4, sigma_above=0.8)],
    ids=str,
)
def test_round_trip(steps):
    plan = make(
        dense_steps=steps,
        proxies=Proxies(per_tile=2),
        statistics={"ramp": 0.0},
        residual=ReuseResidual(refresh=(5, 0.5), group=(1, 4, 4)),
    )
    data = json.loads(json.dumps(plan.to_dict()))
    assert SparsePlan.from_dict(data) == plan
    assert type(data["dense_steps"]) is (type(steps) if isinstance(steps, (int, float)) else dict)
    assert (plan.proxies, plan.statistics) == (Proxies(per_tile=2), ReuseStatistics(ramp=0.0))
    for key in ("proxies", "statistics", "residual"):
        assert f"{key}: {getattr(plan, key)}" in plan.describe()


def test_plans_from_before_have_no_compensation():
    data = make(dense_steps=2).to_dict()
    for key in ("proxies", "statistics", "residual"):
        assert data.pop(key) is None
    old = SparsePlan.from_dict(data)
    assert (old.proxies, old.statistics, old.residual, old.dense_steps) == (None, None, None, 2)
    assert not old.is_compensated
    assert "residual" not in old.describe()


def test_changes_replace_a_compensation_as_a_whole():
    plan = make(dense_steps=2, proxies={"per_tile": 4}, residual={"refresh": 5})
    changed = plan.with_changes(proxies={"kind": "sample"}, residual=None, dense_steps={"first": 1, "last": 1})
    assert (changed.proxies, changed.residual) == (Proxies(kind="sample"), None)
    assert changed.dense_steps == DenseSteps(first=1, last=1)
    assert changed.notes == "changed: proxies, residual, dense_steps"
    with pytest.raises(ValueError, match="proxies has an unknown key 'per_tle'; did you mean 'per_tile'"):
        plan.with_changes(proxies={"per_tle": 2})
    with pytest.raises(ValueError, match=r"residual: refresh: wanted None .* got 0"):
        plan.with_changes(residual={"refresh": 0})
    with pytest.raises(ValueError, match="statistics: wanted a JSON object or ReuseStatistics, got True"):
        plan.with_changes(statistics=True)
    single = make(patterns={"top": TopK()}, default="top", dense_steps=1)
    with pytest.raises(ValueError, match="unknown key 'residul'; did you mean 'residual'"):
        single.with_changes(residul=None)


def test_what_is_used():
    assert not make(assignment=()).is_compensated
    assert make(proxies={}).is_compensated
    assert not make(proxies={}).needs_steps
    assert not make(proxies={}).measures
    top = make(assignment=[{"pattern": "top", "layers": 1}], dense_steps=1)
    assert (top.is_compensated, top.measures, top.needs_steps) == (True, True, True)
    assert list(top.selectors) == ["top"]
    pooled = make(patterns={"top": TopK(score="pooled")}, default="top")
    assert (pooled.is_compensated, pooled.measures, pooled.needs_steps) == (True, False, False)
    mix = make(patterns={"mix": PerHead(patterns=(NEAR, TopP(refresh=3)))}, default="mix", dense_steps=1)
    assert mix.refreshes == {"mix[1]": 3}
    assert mix.names(0, 2, 1) == ("mix[0]", "mix[1]")
    assert mix.selectors["mix[1]"] == TopP(refresh=3)


def test_when_things_are_measured():
    plan = make(
        default="top", patterns={"top": TopK(refresh=4)}, dense_steps=3, statistics={}, residual={"refresh": [5, 0.75]}
    )
    assert plan.measure_steps(12) == {"top": (2, 6, 10), "statistics": (2,), "residual": (2, 5, 9)}
    assert [s for s in range(12) if plan.is_measure_step(s, 12)] == [2, 5, 6, 9, 10]
    assert [plan.measured_at("top", s, 12) for s in range(12)] == [None, None, 2, 2, 2, 2, 6, 6, 6, 6, 10, 10]
    assert [plan.measured_at("residual", s, 12) for s in (1, 4, 5, 11)] == [None, 2, 5, 9]
    assert [plan.stage(s, 12) for s in range(6)] == [-1, -1, -1, 3, 3, 3]
    with pytest.raises(ValueError, match=r"what: 'residul' is not measured; did you mean 'residual'"):
        plan.measured_at("residul", 3, 12)


def test_measurements_without_the_number_of_steps():
    plan = make(default="top", patterns={"top": TopK(refresh=4)}, dense_steps=2, residual={"refresh": [5]})
    assert [s for s in range(20) if plan.is_measure_step(s, None)] == [1, 5, 9, 13, 17]
    assert plan.measured_at("residual", 100, None) == 5


def test_nothing_is_measured_that_no_sparse_step_would_use():
    plan = make(dense_steps={"first": 2, "last": 3}, residual={"refresh": 2})
    assert plan.measure_steps(10) == {"residual": (1, 3, 5)}
    assert make(dense_steps=4, residual={}).measure_steps(4) == {"residual": ()}
    assert make(dense_steps=4, residual={}).measured_at("residual", 3, 4) is None


@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([0, 2, 3]),
    st.sampled_from([None, 1, 3, 0.5, (3, 7), (0.2, 0.6)]),
    st.integers(1, 16),
)
def test_measurements_are_always_fresh_and_always_used(first, last, every, refresh, total):
    steps = DenseSteps(first=first, last=last, every=every)
    table = Timetable(steps, {"residual": refresh}, total)
    sparse = [step for step in range(total) if not table.is_dense(step)]
    marks = [step for step in range(total) if table.is_measured(step)]
    for step in sparse:
        at = table.measured_at("residual", step)
        assert at is not None
        assert at == max(mark for mark in marks if mark < step)
    if sparse:
        assert marks[0] == table.first_sparse - 1
    wanted = [step for step in range(total) if not table.scheduled(step)]
    assert all(mark < max(wanted) for mark in marks)


def test_runs_that_cannot_be_served():
    plan = make(dense_steps=0.1, residual={})
    assert plan.check_run(10) is None
    with pytest.raises(
        ValueError,
        match=r"residual: wanted a dense step before the first sparse one to measure at, got none in a run of 4 steps",
    ):
        plan.check_run(4)
    with pytest.raises(
        ValueError, match=r"got none in a run of 2 steps \(dense_steps: sigma of at least 5\); use dense_steps=1"
    ):
        make(dense_steps={"sigma_above": 5.0}, residual={}).check_run(2, (1.0, 0.5))
    for bad in ({"dense_steps": 0}, {"dense_steps": {"last": 2, "every": 3}}):
        with pytest.raises(
            ValueError, match=r"plan: top, statistics: wanted a dense step .*, got none \(.*; use dense_steps=1 or more"
        ):
            make(default="top", statistics={}, **bad)


def test_runs_without_a_sparse_step_say_so():
    assert make(dense_steps=4).check_run(4) == (
        "all 4 steps are dense by the plan's schedule (first 4 steps); use fewer dense steps"
    )
    assert make(dense_steps=1, residual={"refresh": 1}).check_run(6) is None
    assert make(dense_steps=4).check_run(5) is None
    assert make(dense_steps=4).check_run(None) is None


def test_selectors_where_they_cannot_be():
    with pytest.raises(ValueError, match=r"'both': a selector cannot be a part of a union"):
        make(patterns={"near": NEAR, "both": Union(patterns=(NEAR, TopK()))})
    with pytest.raises(ValueError, match=r"'mix': a selector cannot be a part of a union"):
        make(patterns={"near": NEAR, "mix": PerHead(patterns=(NEAR, Union(patterns=(TopK(),))))})
    with pytest.raises(ValueError, match=r"the selector 'residual' has the name of a compensation"):
        make(patterns={"residual": TopK()}, default="residual", dense_steps=1)


def test_the_last_stage_needs_no_noise_levels():
    plan = make(dense_steps={"sigma_above": 0.5}, assignment=[{"pattern": "top", "steps": "4:7"}])
    assert plan.last_stage(10) == 7
    assert plan.last_stage(10, (1.0,) * 9 + (0.4,)) == 9


def test_in_words():
    assert str(DenseSteps(first=1, last=0.2, every=4, sigma_above=0.7)) == (
        "first 1 step, last 20% of the steps, 1 of 4 from the first sparse one, sigma of at least 0.7"
    )
    assert str(DenseSteps()) == "none"
