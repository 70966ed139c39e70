"""One allocation over all items, against every choice there is; the published rule; schedules and ceilings."""

import itertools
import math
import random

import pytest

from visparse.head_search.allocate import Option, allocate, cheapest
from visparse.head_search.published import sparse_vdit
from visparse.head_search.schedule import calibrate, make_schedule


def random_items(seed, items=5, options=4):
    draw = random.Random(seed)
    found = []
    for _ in range(items):
        scale = 10 ** draw.uniform(-3, 1)
        found.append([Option(draw.uniform(0, 3), scale * draw.random() ** 2) for _ in range(options)])
    return found


def best_of_all(items, budget):
    fits = [
        sum(one.error for one in picked)
        for picked in itertools.product(*items)
        if sum(one.cost for one in picked) <= budget + 1e-12
    ]
    return min(fits)


@pytest.mark.parametrize("seed", range(30))
def test_bound_and_choice_enclose_the_best(seed):
    items = random_items(seed)
    least = sum(min(one.cost for one in options) for options in items)
    for budget in (least * 1.02, least + 2, least + 5, 100.0):
        found = allocate(items, budget)
        best = best_of_all(items, budget)
        assert found.cost <= budget * (1 + 1e-8)
        assert found.bound <= best * (1 + 1e-9)
        assert found.error >= best * (1 - 1e-9)
        assert found.error == pytest.approx(sum(o[p].error for o, p in zip(items, found.picks, strict=True)))
        assert found.error <= best + max(max(o.error for o in options) for options in items)
        assert found.gap >= 0
    assert allocate(items, 100.0).error == pytest.approx(best_of_all(items, 100.0))


def test_exact_where_the_hull_fits_the_budget():
    items = [[Option(0, 1), Option(1, 0.2), Option(2, 0.0)]] * 3
    found = allocate(items, 3)
    assert found.error == pytest.approx(0.6)
    assert found.gap == pytest.approx(0.0, abs=1e-12)
    assert allocate(items, 0).picks == (0, 0, 0)


def test_many_equal_items_come_close_to_the_bound():
    draw = random.Random(1)
    items = [[Option(c, 10 ** draw.uniform(-2, 0) / (c + 0.1)) for c in (0, 1, 2, 4, 8)] for _ in range(300)]
    assert allocate(items, 600).gap < 0.01


def test_least_cost_within_an_error():
    items = random_items(3)
    wish = sum(min(one.error for one in options) for options in items) * 1.5 + 1e-6
    found = cheapest(items, wish)
    assert found.error <= wish * (1 + 1e-8)
    least = min(
        sum(one.cost for one in picked)
        for picked in itertools.product(*items)
        if sum(one.error for one in picked) <= wish
    )
    assert least <= found.cost + 1e-9 <= least + 3


def test_bad_input():
    with pytest.raises(ValueError, match=r"budget: wanted at least 2, what the cheapest candidates cost, got 1"):
        allocate([[Option(2, 0)]], 1)
    with pytest.raises(ValueError, match="item 1 has none; add the dense one"):
        allocate([[Option(1, 1)], []], 1)
    with pytest.raises(ValueError, match="wanted finite costs and errors"):
        allocate([[Option(1, math.nan)]], 1)


def test_published_rule():
    assert sparse_vdit([0.4, 0.1, 0.3], [0.0, 0.5, 0.25]) == 1  # 0.4, 0.35, 0.425
    assert sparse_vdit([0.4, 0.3, 0.3], [0.0, 0.5, 0.25]) == 0
    assert sparse_vdit([2.0, 0.9, 1.5], [0.0, 0.5, 0.25]) is None
    assert sparse_vdit([2.0, 0.9, 1.5], [0.0, 0.5, 0.25], limit=1.2) == 1
    assert sparse_vdit([0.4, 0.1], [0.0, 0.5], weight=1.0) == 0


def test_schedules_and_ceilings():
    plain, foveal = (make_schedule(family, 20, 0.25, 0.6) for family in ("plain", "foveal"))
    assert (plain.sparse, plain.measured) == (tuple(range(5, 20)), ())
    assert foveal.measured == (4, 12)
    assert foveal.sparse == tuple(s for s in range(5, 20) if s != 12)
    calibration = calibrate(foveal, 4)
    assert sorted(calibration.judge)[0] == 5
    assert sorted(calibration.judge)[-1] == 19
    assert len(calibration.judge) == 4
    assert calibration.measure == {4, 12}
    # half of a step is attention: 20 steps of 2 units; 5 dense ones and 20 times the rest stay
    assert plain.ceiling(0.5) == pytest.approx(40 / 25)
    assert plain.attention_for(plain.ceiling(0.5), 0.5) == pytest.approx(0)
    assert plain.attention_for(1.25, 0.5) == pytest.approx((40 / 1.25 - 25) / 15)
    for schedule in (plain, foveal):
        wanted = schedule.attention_for(1.2, 0.5)
        assert schedule.speedup_at(wanted, 0.5) == pytest.approx(1.2)
        assert schedule.ceiling(0.5) <= plain.ceiling(0.5)
    with pytest.raises(ValueError, match="no step of 4 would be sparse with 4; use fewer dense steps"):
        make_schedule("plain", 4, 4, None)
