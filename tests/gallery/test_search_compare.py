"""The comparison of searched plans with single patterns: sizes, tuning, verdicts, picture."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from visparse import SparsePlan
from visparse.patterns.registry import PATTERNS

GALLERY = Path(__file__).parents[2] / "gallery"
FOLDERS = (GALLERY / "search", GALLERY / "compensation")
Load = Callable[[str], ModuleType]


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 16, 16), (17, 64, 64)])
def test_every_pattern_of_the_library_is_tried(load: Load, grid: tuple[int, int, int]) -> None:
    kinds = load("compare_singles").all_kinds(grid)
    names = {pattern.name for rungs in kinds.values() for pattern in rungs}
    made_of_others = {"dense", "skip", "intersection"}
    assert names == set(PATTERNS) - made_of_others
    assert all(len(set(rungs)) == len(rungs) for rungs in kinds.values())


@pytest.mark.parametrize("kind", ["rows", "disc", "multi-diagonal", "decay"])
def test_sizes_of_a_kind_cost_more_and_more(load: Load, kind: str) -> None:
    module = load("compare_singles")
    ladder = module.Ladder(kind, module.all_kinds((5, 16, 16))[kind], "foveal", (5, 16, 16), 64, "cpu")
    costs = [ladder.cost(place) for place in range(len(ladder.rungs))]
    assert costs == sorted(costs)
    assert costs[-1] > costs[0]


def test_the_largest_size_below_a_share_is_taken(load: Load) -> None:
    module = load("compare_singles")
    rungs = module.all_kinds((5, 16, 16))["tube"]
    ladder = module.Ladder("tube", rungs, "plain", (5, 16, 16), 64, "cpu", dict(enumerate(range(1, len(rungs) + 1))))
    assert ladder.below(3.5) == (rungs[2], 3)
    assert ladder.below(3) == (rungs[2], 3)
    assert ladder.below(0.9) is None
    assert ladder.below(1e9) == (rungs[-1], len(rungs))
    assert ladder.known_below(3.5) == (rungs[2], 3)
    ladder.costs = {**ladder.costs, 5: 3.2}  # a larger size that costs less than one before it
    assert ladder.below(3.5) == (rungs[5], 3.2)


def test_processes_find_the_same_costs(load: Load) -> None:
    module = load("compare_singles")

    def ladders() -> list[Any]:
        return [module.Ladder("disc", module.all_kinds((5, 16, 16))["disc"], "plain", (5, 16, 16), 64, "cpu")]

    (near,) = module.fill(ladders(), [0.7], 1)()
    (own,) = ladders()
    assert near.costs
    assert own.below(0.7) == near.below(0.7)
    assert own.costs == near.costs


# ---- tuning ----------------------------------------------------------------------------------------------------------


class Bench:
    """Trials whose measured time is a factor above the predicted one; PSNR grows with it."""

    def __init__(self, module: ModuleType, factor: float) -> None:
        self.module, self.factor, self.asked = module, factor, list[float]()

    def offers(self, share: float) -> Any:
        self.asked.append(share)
        if share < 0.05:
            raise ValueError("no size")
        return self.module.Offer(SparsePlan(name=f"{share:.6f}", patterns={"x": {"name": "dense"}}, default="x"), share)

    def trial(self, offer: Any) -> Any:
        return self.module.Trial(offer, offer.share * self.factor, 20 + 10 * offer.share)

    def tuned(self, share: float, tries: int) -> Any:
        return self.module.Arena.tuned(self, self.offers, share, tries)


def test_plans_are_tuned_to_the_measured_time(load: Load) -> None:
    bench = Bench(load("compare_arena"), 1.25)
    trials = bench.tuned(0.25, 3)
    assert bench.asked == [0.25, 0.1875, pytest.approx(0.2)]
    shares = [0.25, 0.234375, 0.3125]  # the last one is late, though its PSNR is higher
    assert [one.share for one in trials] == pytest.approx(shares)
    bench = Bench(load("compare_arena"), 1.0)
    assert len(bench.tuned(0.25, 3)) == 1
    bench = Bench(load("compare_arena"), 8.0)
    assert len(bench.tuned(0.25, 3)) == 1  # nothing is cheap enough
    with pytest.raises(ValueError, match="no size"):
        bench.tuned(0.01, 3)


# ---- what it says ----------------------------------------------------------------------------------------------------


def sparse(label: str, kind: str, what: str, psnr: float, share: float, target: float = 0.25) -> dict[str, Any]:
    return {
        "plan": "sparse",
        "label": label,
        "kind": kind,
        "what": what,
        "psnr": psnr,
        "target": target,
        "measured_share": share,
        "attention_cost": 0.25 + 0.75 * share,
    }


ROWS = [
    {"plan": "dense", "label": "dense", "steps": 12},
    sparse("a", "searched", "plain", 30.0, 0.25),
    sparse("b", "searched", "foveal", 33.0, 0.24),
    sparse("c", "single", "tube", 27.0, 0.2),
    sparse("d", "single", "disc", 28.0, 0.3),
    sparse("e", "compensated", "uniform", 31.5, 0.24),
    sparse("f", "single", "tube", 20.0, 0.12, 0.125),
    {"plan": "fewer-steps", "label": "6", "steps": 6, "psnr": 25.0},
]


def test_verdicts(load: Load) -> None:
    (one,) = load("compare_table").verdicts(ROWS)  # nothing was searched for the other target
    assert (one["target"], one["searched"]["label"]) == (0.25, "b")
    assert one["above"]["single"] == {
        "label": "d",
        "psnr": 28.0,
        "measured_share": 0.3,
        "by": 5.0,
        "time": pytest.approx(0.8),
        "run": pytest.approx(0.43 / 0.475),
    }
    assert one["above"]["compensated"]["by"] == 1.5
    assert one["above"]["published"] is None
    assert one["plain_above_single"] == {
        "by": 2.0,
        "time": pytest.approx(0.25 / 0.3),
        "run": pytest.approx(0.4375 / 0.475),
    }


def test_a_time_that_is_not_known_is_left_out(load: Load) -> None:
    rows = [one | {"measured_share": None} if one["label"] == "b" else one for one in ROWS]
    (one,) = load("compare_table").verdicts(rows)
    assert one["above"]["compensated"]["time"] is None
    text = load("compare_table").table([row | {"latent_error": 0.1} for row in rows], {})
    assert "compensated +1.50 dB in 1.00 of its attention of a run (e)" in text


def test_points_and_picture(load: Load) -> None:
    module = load("compare_picture")
    found = module.points(ROWS)
    assert found["searched foveal"] == [(pytest.approx(0.43), 33.0)]
    assert [psnr for _, psnr in found["single"]] == [20.0, 27.0, 28.0]
    assert found["fewer"] == [(0.5, 25.0)]
    image = module.pareto_picture(ROWS, "title")
    colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {colour for _, colour in module.SERIES.values()} <= colours
    with pytest.raises(ValueError, match="rows: wanted at least one sparse row"):
        module.pareto_picture(ROWS[:1], "title")


# ---- the search ------------------------------------------------------------------------------------------------------


def test_epsilon_brings_the_published_rule_to_a_cost(load: Load) -> None:
    module = load("compare_searched")
    searched = object.__new__(module.Searched)
    heads = [0.1 * n for n in range(1, 11)]  # each becomes sparse where epsilon reaches its loss
    asked: list[Any] = []

    def by_paper(layers: int, limit: float) -> Any:
        return SimpleNamespace(attention=sum(0.1 if limit < loss else 0.02 for loss in heads))

    def offer(name: str, found: Any) -> Any:
        asked.append((name, found.attention))

    searched.table, searched.model = SimpleNamespace(by_paper=by_paper), SimpleNamespace(layers=8)
    searched._offer = offer
    searched.by_paper(0.5)  # seven sparse heads cost 0.44, six 0.52
    searched.by_paper(0.1)  # cannot be had: all ten are sparse
    assert [cost for _, cost in asked] == pytest.approx([0.44, 0.2])
    assert asked[0][0] == "sparse-vdit, epsilon 0.7"


class Pool:
    """Stands for an arena and its search: two ways, and what a climb finds."""

    def __init__(self, load: Load, found: float | None, late: bool) -> None:
        self.arena, self.offer = load("compare_arena"), load("compare_searched").Offer
        self.searched, self.options, self.asked = self, dict[str, Any](), list[Any]()
        self.psnr = {"by weight": 40.0, "alike": 42.0, "climbed": found}
        self.late = late

    def variants(self, family: str) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("by weight", "alike")]

    def climbed(self, variant: Any, share: float, name: str, tries: int) -> Any:
        self.asked.append(("climb", variant.name, share, name, tries))
        return None if self.psnr["climbed"] is None else SimpleNamespace(name="climbed")

    def by_budget(self, family: str, share: float, variant: Any) -> Any:
        self.asked.append((variant.name, share))
        return self.offer(SparsePlan(name=variant.name, patterns={"x": {"name": "dense"}}, default="x"), share)

    def tuned(self, offers: Any, target: float, tries: int, aim: float | None) -> list[Any]:
        offer = offers(target if aim is None else aim * 1.1)
        late = self.late and offer.plan.name == "climbed"
        return [self.arena.Trial(offer, target * (1.2 if late else 1.0), self.psnr[offer.plan.name])]

    def row(self, label: str, trial: Any, target: float, **more: Any) -> dict[str, Any]:
        return {"label": label, "plan": trial.offer.plan.name, **more}


@pytest.mark.parametrize(
    ("found", "late", "wanted"), [(39.0, False, "climbed"), (50.0, True, "alike"), (None, False, "alike")]
)
def test_a_climb_begins_at_the_best_way_and_counts_in_time(
    load: Load, found: float | None, late: bool, wanted: str
) -> None:
    pool = Pool(load, found, late)
    jobs = load("compare_jobs")
    comparison = jobs.Comparison(pool, list, [0.25], kinds=1, tries=2, refine=[5], in_time=lambda: True)
    row = comparison.searched(0.25, "foveal")
    assert (row["label"], row["plan"]) == ("searched, foveal @ 25.0%", wanted)
    asked = [("by weight", 0.25), ("alike", pytest.approx(0.275))]
    asked.append(("climb", "alike", pytest.approx(0.275), "foveal @ 25.0%", 2))
    assert pool.asked[:3] == asked
    assert pool.asked[3:] == ([] if found is None else [("climbed", pytest.approx(0.3025))])
    pool.asked.clear()
    assert comparison.searched(0.25, "plain")["plan"] == "alike"
    assert len(pool.asked) == 2  # the plain family does not climb


def test_each_target_has_its_own_climb(load: Load) -> None:
    make = partial(load("compare_jobs").Comparison, None, list, [0.125, 0.25, 0.5], kinds=1, tries=2, in_time=bool)
    assert make(refine=[20, 3]).refine == {0.125: 20, 0.25: 3, 0.5: 3}
    assert make(refine=[3]).refine == dict.fromkeys([0.125, 0.25, 0.5], 3)


def test_a_sparse_step_is_the_mean_of_its_ranges(load: Load) -> None:
    watch = load("compare_arena").Stopwatch.__new__(load("compare_arena").Stopwatch)
    watch.steps = ((9.0, 1.0, 1.0, 4.0, 4.0, 4.0), (9.0, 1.2, 1.0, 4.0, 4.0, 4.0), (9.0, 8.0, 1.0, 4.0, 4.0, 4.0))
    assert watch.seconds_at(range(1, 6)) == pytest.approx((1.2 + 1 + 3 * 4) / 5)
    assert watch.seconds_at([0]) == 9.0
