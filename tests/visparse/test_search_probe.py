"""The probe's arithmetic, the clock that it reads, weights by groups of layers, and schedules to try."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from visparse.compensation import Proxies
from visparse.head_search.candidates import Candidate, Candidates
from visparse.head_search.choose import Table
from visparse.head_search.costs import Costs
from visparse.head_search.judge import OutputJudge, digest
from visparse.head_search.probe import Line, corrected, line_through, uniform_plan
from visparse.head_search.refine import schedules_to_try
from visparse.head_search.schedule import make_schedule
from visparse.head_search.sensitivity import find_weights, group_plan, groups_of, reference_place
from visparse.head_search.work import WorkFile
from visparse.measure.timing import CallClock
from visparse.patterns import Dense, Neighborhood, Skip, TopK
from visparse.plan import SparsePlan
from visparse.rules import ModelFingerprint

TOP = TopK(share=0.25, score="mass_variance", refresh=4)
NEAR = Neighborhood(window=(1, 3, 3))
KEPT = (
    Candidate("dense", "plain", Dense()),
    Candidate("near", "plain", NEAR),
    Candidate("dense", "foveal", Dense()),
    Candidate("skip", "foveal", Skip()),
    Candidate("top4", "foveal", TOP),
)
COSTS = Costs(
    device="cpu",
    source="rates",
    dense=2.0,
    milliseconds=(2.0, 0.5, 2.0, 0.0, 0.6),
    block_density=(1.0, 0.25, 1.0, 0.0, 0.25),
)
LAYERS, HEADS = 3, 2


def make_table(**more):
    scores = {}
    for step in (2, 6):
        for layer in range(LAYERS):
            rows = [[0.0] * HEADS, [0.02] * HEADS, [0.0] * HEADS, [0.5] * HEADS, [0.01 * (layer + 1)] * HEADS]
            scores[0, step, "a", 0, layer] = {"error": rows, "mse": [None] * len(KEPT)}
    schedules = {family: make_schedule(family, 8, 1, 4, **more) for family in ("plain", "foveal")}
    return Table(scores, Candidates(kept=KEPT, left_out={}, proxies=Proxies(per_tile=4)), COSTS, schedules)


def test_a_line_goes_through_both_points_and_is_never_below_zero():
    line = line_through((2.0, 5.0), (6.0, 7.0))
    assert (line.call, line.factor) == (4.0, 0.5)
    steep = line_through((2.0, 1.0), (4.0, 6.0))  # would begin at -4
    assert (steep.call, steep.factor) == (0.0, pytest.approx(7 / 6))
    falling = line_through((2.0, 5.0), (4.0, 4.0))
    assert (falling.call, falling.factor) == (0.0, 1.5)
    assert line_through((2.0, 0.0), (4.0, 0.0)) == Line(0.0, 0.0)


def test_costs_are_brought_to_what_was_measured():
    assert corrected(COSTS, KEPT, {}, None) is COSTS
    found = corrected(COSTS, KEPT, {"foveal": Line(0.3, 2.0)}, 1.5)
    assert found.milliseconds == (2.0, 0.5, 4.0, 0.0, 1.2)
    assert (found.dense, found.call, found.block_density) == (1.5, {"foveal": 0.3}, COSTS.block_density)
    assert (
        found.source
        == "rates; brought to this model by two plans of each family: foveal 2.00 of the rates and 0.3 ms a call"
    )
    assert corrected(COSTS, KEPT, {"plain": Line(0.0, 1.0)}, None).dense == 2.0


def test_what_a_call_takes_is_paid_for_each_layer():
    table = make_table()
    dear = Table(
        table.scores, table.candidates, corrected(COSTS, KEPT, {"foveal": Line(0.4, 1.0)}, None), table.schedules
    )
    cheap = table.by_budget("foveal", LAYERS, attention=0.5)
    less = dear.by_budget("foveal", LAYERS, attention=0.5)
    assert less.error >= cheap.error
    assert less.milliseconds <= 0.5 * 2.0 * HEADS * LAYERS
    one = dear.uniform("foveal", 4, LAYERS)
    assert one.layers[0][1] == pytest.approx(HEADS * 0.6 + 0.4)
    dense = dear.uniform("foveal", 2, LAYERS)  # a layer that is all dense is no sparse call
    assert dense.layers[0][1] == pytest.approx(HEADS * 2.0)
    with pytest.raises(
        ValueError, match=r"budget: a sparse call of a layer takes 0.4 ms before its first block, dense"
    ):
        dear.by_budget("foveal", LAYERS, attention=0.05)


def test_plans_of_the_probe():
    plain, foveal = uniform_plan(KEPT[1], Proxies()), uniform_plan(KEPT[4], Proxies(per_tile=4))
    assert (plain.dense_steps, plain.proxies, plain.residual) == (0, None, None)
    assert (foveal.dense_steps, foveal.proxies, foveal.residual.refresh) == (1, Proxies(per_tile=4), None)
    assert foveal.selectors["all"].refresh is None
    pooled = uniform_plan(Candidate("p", "pooled", TopK(share=0.25, score="pooled")), Proxies())
    assert (pooled.dense_steps, pooled.residual, pooled.measures) == (0, None, False)


def test_the_clock_times_every_call_and_leaves_no_hook():
    class Slow(nn.Module):
        def forward(self, seconds):
            time.sleep(seconds)
            return seconds

    modules = Slow(), Slow()
    with CallClock(modules, torch.device("cpu")) as clock:
        modules[0](0.03)
        modules[1](0.0)
        modules[0](0.06)
    modules[0](0.0)
    assert len(clock.seconds) == 3
    assert clock.seconds[0] >= 0.03
    assert clock.seconds[1] < clock.seconds[0]
    assert clock.seconds[2] >= 0.06
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_groups_of_layers():
    assert groups_of([0, 1, 2, 5, 6], 2) == [[0, 1], [2, 5, 6]]
    assert groups_of([3, 4], 8) == [[3], [4]]
    assert groups_of(range(6), 3) == [[0, 1], [2, 3], [4, 5]]


def test_one_group_is_sparse_in_one_range():
    table = make_table(ranges=True)
    assert table.ranges == 2
    model = ModelFingerprint(model_class="M", layers=LAYERS, heads=HEADS, head_dim=64)
    plain = SparsePlan(
        name="x", patterns={"near": NEAR}, default="near", dense_steps=1, model=model, made_for=(2, 8, 8)
    )  # without a residual: the refresh is not taken from it
    place = reference_place(table, "foveal", 0.3)
    assert KEPT[place].pattern == TOP
    plan = group_plan(table, "foveal", place, [1, 2], 1, plain, 4)
    assert plan.names(0, HEADS, 1) is None
    assert [plan.names(1, HEADS, stage) for stage in (1, 4, 6)] == [None, ("top4",) * HEADS, ("top4",) * HEADS]
    assert plan.measure_steps(8) == {"residual": (0, 4), "top4": (0, 4)}
    assert plan.proxies == Proxies(per_tile=4)

    asked = []

    class Judge:
        def errors(self, plan, label):
            asked.append(label)
            return (0.0, 0.0) if "layers 0" in label else (0.1, 0.1)

    weights = find_weights(table, "foveal", 0.3, 2, plain, 4, Judge())
    assert asked == [f"layers {span}, range {number}" for number in (1, 2) for span in ("0 to 1", "2 to 2")]
    assert weights[0, 0] == weights[0, 1] == weights[1, 1] == 0.0
    # squared error of the output over the squared errors of the group in its share of the sparse steps
    assert weights[0, 2] == pytest.approx(0.01 / (0.5 * HEADS * 0.03))
    chosen = table.by_budget("foveal", LAYERS, attention=0.5, weights=weights)
    assert chosen.output_error == pytest.approx(
        sum(
            weights[part] * 0.5 * sum(table.error[part][KEPT.index(chosen.picks[(*part, h)])][h] for h in range(HEADS))
            for part in weights
        )
        ** 0.5
    )
    assert chosen.picks[0, 2, 0].name == "dense"  # all that counts is layer 2
    # a prompt with large errors in all groups says no more than the others
    found = [(1.0, 0.1), (2.0, 0.1), (1.0, 0.3), (2.0, 0.1)]
    Judge.errors = lambda self, plan, label: found[asked.append(label) or len(asked) - 5]
    weights = find_weights(table, "foveal", 0.3, 2, plain, 4, Judge())
    # squared errors over the sums, 10 and 0.12, times the mean of these
    squared = [5.06 / 2 * (a**2 / 10 + b**2 / 0.12) for a, b in found]
    own = [0.5 * HEADS * error for error in (0.01 + 0.02, 0.03)]
    for number in range(2):
        assert weights[number, 0] == weights[number, 1] == pytest.approx(squared[2 * number] / own[0])
        assert weights[number, 2] == pytest.approx(squared[2 * number + 1] / own[1])
    Judge.errors = lambda self, plan, label: None
    assert find_weights(table, "foveal", 0.3, 2, plain, 4, Judge()) is None


def test_what_makes_no_error_is_not_weighed_by():
    table = make_table()
    assert reference_place(table, "foveal", 0.3) == 4
    for rows in table.error.values():
        rows[4] = [1e-14] * HEADS
    assert KEPT[reference_place(table, "foveal", 0.3)].name == "skip"


def test_schedules_that_cannot_be_made_say_why():
    found, refused = schedules_to_try(lambda s, r: make_schedule("foveal", 6, s, r), [1, 2, 2, 6, 0], [None, 3, 0.99])
    assert list(found) == [(1, None), (1, 3), (2, None), (2, 3)]  # what is due at the last step is not measured
    assert set(refused) == {(steps, refresh) for steps in (6, 0) for refresh in (None, 3, 0.99)}
    assert "no step of 6 would be sparse with 6; use fewer dense steps" in refused[6, None]
    assert "use dense_steps=1 or more" in refused[0, None]


def test_a_plan_is_known_by_what_it_does():
    plan = uniform_plan(KEPT[1], Proxies())
    same = SparsePlan.from_dict({**plan.to_dict(), "name": "other", "notes": "x", "measured": {"a": 1}})
    assert digest(same) == digest(plan)
    assert digest(SparsePlan.from_dict({**plan.to_dict(), "dense_steps": 1})) != digest(plan)


@pytest.mark.parametrize("kind", ["images", "frames"])
def test_pictures_are_judged_as_frames_are(monkeypatch, kind):
    entered = []

    class Handle:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            entered.pop()

    monkeypatch.setattr("visparse.sparsify", lambda pipe, plan: Handle())
    made = []

    def generate(prompt):
        made.append((prompt, bool(entered)))
        picture = torch.full((1, 4, 4, 3), 0.5 + (0.1 * (prompt + 1) if entered else 0.0))
        return SimpleNamespace(**{kind: picture.numpy()})

    plan = uniform_plan(KEPT[1], Proxies())
    work = WorkFile(None, {})
    judge = OutputJudge(None, generate, 2, work)
    assert judge.error(plan, "one") == pytest.approx(0.15)
    assert judge.errors(plan, "one") == pytest.approx((0.1, 0.2))
    assert made == [(0, False), (1, False), (0, True), (1, True)]
    assert judge.error(plan, "again") == pytest.approx(0.15)
    assert len(made) == 4
    late = OutputJudge(None, generate, 2, work, deadline=time.perf_counter())
    assert late.error(plan, "known") == pytest.approx(0.15)
    assert late.error(uniform_plan(KEPT[0], Proxies()), "new") is None
