"""Plans made for one grid and used on another, and plans with one pattern per head."""

import json
from dataclasses import replace

import pytest
import torch

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns import Dense, Intersection, Neighborhood, Pattern, PerHead, Radial, Skip, Union
from visparse.patterns.lengths import three
from visparse.plan import SparsePlan
from visparse.rules import ModelFingerprint, Rule
from visparse.templates import PatternTemplate

MODEL = ModelFingerprint(model_class="WanTransformer3DModel", layers=2, heads=4, head_dim=64)
SMALL, LARGE = (21, 30, 52), (21, 45, 80)  # Wan: 81 frames at 480p and at 720p
NEAR = Neighborhood(window=(7, 10, 13), stride=(1, 2, 4))


def plan(patterns: dict[str, object], **fields: object) -> SparsePlan:
    return SparsePlan.from_dict(
        {"schema": 1, "name": "made", "patterns": patterns, "default": next(iter(patterns))} | fields
    )


def near_on(grid: Grid, made_for: Grid | None = SMALL, pattern: object = NEAR) -> Pattern:
    return (
        SparsePlan(name="made", patterns={"near": pattern}, default="near", made_for=made_for)
        .patterns["near"]
        .resolve(grid)
    )


def lengths(pattern: Pattern) -> tuple[Grid, Grid]:
    assert isinstance(pattern, Neighborhood)
    return three(pattern.window), three(pattern.stride)


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [
        (SMALL, (7, 10, 13), (1, 2, 4)),
        (LARGE, (7, 15, 20), (1, 3, 6)),  # 720p: 10 * 45 / 30, 13 * 80 / 52 and so on
        ((41, 30, 52), (14, 10, 13), (1, 2, 4)),  # twice the frames; a stride of 1 stays 1
        ((21, 52, 30), (7, 17, 8), (1, 3, 2)),  # upright: 10 * 52 / 30 = 17.3, 13 * 30 / 52 = 7.5
        ((1, 30, 52), (1, 10, 13), (1, 2, 4)),  # one frame: a picture
        ((1, 1, 52), (1, 1, 13), (1, 1, 4)),
    ],
)
def test_lengths_follow_their_axes_from_the_grid_that_they_were_made_for(
    grid: Grid, window: Grid, stride: Grid
) -> None:
    pattern = near_on(grid)
    assert lengths(pattern) == (window, stride)
    at = torch.zeros(1, 3, dtype=torch.int64)
    assert pattern.keep(at, at, grid).all()


def test_without_a_grid_lengths_stay() -> None:
    assert near_on(LARGE, None) == NEAR
    with pytest.raises(ValueError, match="needs 7 tokens on the frames axis"):
        plan({"near": NEAR.to_dict()}).check_grid(MODEL, (1, 30, 52), None)
    plan({"near": NEAR.to_dict()}, made_for=SMALL).check_grid(MODEL, (1, 30, 52), None)


def test_shares_are_of_the_grid_at_hand() -> None:
    entry = {"name": "neighborhood", "window": [7, "50%/8", "25%/4"], "stride": [1, 2, 4]}
    assert lengths(near_on(SMALL, SMALL, entry)) == ((7, 16, 12), (1, 2, 4))
    assert lengths(near_on(LARGE, SMALL, entry)) == ((7, 24, 20), (1, 3, 6))
    # 41 frames: the length 7 follows, the shares do not see where it came from
    assert lengths(near_on((41, 30, 52), SMALL, entry)) == ((14, 16, 12), (1, 2, 4))
    shares = {"name": "neighborhood", "window": ["50%", "50%/8", "25%/4"]}
    for grid in (SMALL, LARGE, (1, 5, 3)):
        assert lengths(near_on(grid, SMALL, shares))[0] == lengths(near_on(grid, None, shares))[0]


def test_parts_of_combined_patterns_follow_too() -> None:
    both = Union(patterns=(NEAR, Intersection(patterns=(Neighborhood(window=(21, 30, 26)), Radial()))))
    got = near_on(LARGE, SMALL, both)
    assert isinstance(got, Union)
    near, meet = got.patterns
    assert lengths(near) == ((7, 15, 20), (1, 3, 6))
    assert isinstance(meet, Intersection)
    assert lengths(meet.patterns[0])[0] == (21, 45, 40)
    assert meet.patterns[1] == Radial()
    entry = {"name": "union", "patterns": [{"name": "neighborhood", "window": ["100%", 10, "50%"]}, {"name": "skip"}]}
    union = near_on(LARGE, SMALL, entry)
    assert isinstance(union, Union)
    assert union.to_dict()["patterns"][0]["window"] == [21, 15, 40]
    assert union.patterns[1] == Skip()


class TestJson:
    def test_round_trip(self) -> None:
        made = plan({"near": NEAR.to_dict(), "mix": PerHead(patterns=(NEAR, Dense()), cycle=True)}, made_for=SMALL)
        data = json.loads(json.dumps(made.to_dict()))
        assert data["made_for"] == [21, 30, 52]
        assert SparsePlan.from_dict(data) == made
        assert replace(made, made_for=None).patterns["near"].resolve(LARGE) == NEAR
        assert "made for grid 21x30x52, rescaled to others" in made.describe()
        assert "mix: per_head(neighborhood(" in made.describe()

    def test_plans_from_before_are_read(self) -> None:
        data = plan({"near": NEAR.to_dict()}).to_dict()
        del data["made_for"]
        assert SparsePlan.from_dict(data).made_for is None

    def test_other_changes_keep_the_grid(self) -> None:
        changed = plan({"near": NEAR.to_dict()}, made_for=SMALL).with_changes(window=[7, 30, 52])
        window = changed.patterns["near"].resolve(LARGE).to_dict()["window"]
        assert window == [7, 45, 80]

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"made_for": [21, 30]}, r"plan: made_for must be three ints > 0 .*, got \[21, 30\]"),
            ({"made_for": [0, 30, 52]}, r"plan: made_for must be three ints > 0"),
            ({"made_for": 21}, r"plan: made_for must be three ints > 0 \(frames, height, width\), got 21"),
            ({"made_for": [5, 30, 52]}, "plan: pattern 'near': window: 7 with dilation 1 needs 7 tokens on the frames"),
            ({"madefor": [21, 30, 52]}, "unknown key 'madefor'; did you mean 'made_for'"),
        ],
    )
    def test_errors(self, fields: dict, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            plan({"near": NEAR.to_dict()}, **fields)


class TestPerHead:
    MIX = PerHead(patterns=(NEAR, Radial(), Dense(), Skip()))

    def test_every_head_has_its_pattern(self) -> None:
        made = plan({"mix": self.MIX.to_dict()}, made_for=SMALL)
        names = made.names(0, 4, 0)
        assert names == ("mix[0]", "mix[1]", "mix[2]", "mix[3]")
        assert [made.patterns[name].resolve(SMALL) for name in names] == list(self.MIX.patterns)
        assert [made.patterns[name].resolve(LARGE) for name in names] == list(self.MIX.rescale(SMALL, LARGE).patterns)
        assert lengths(made.patterns["mix[0]"].resolve(LARGE)) == ((7, 15, 20), (1, 3, 6))

    def test_a_rule_may_give_it_to_some_heads(self) -> None:
        rules = (Rule(pattern="mix", layers=1, heads="2:"),)
        made = SparsePlan(name="made", patterns={"near": NEAR, "mix": self.MIX}, default="near", assignment=rules)
        assert made.names(0, 4, 0) == ("near",) * 4
        assert made.names(1, 4, 0) == ("near", "near", "mix[2]", "mix[3]")

    def test_cycled(self) -> None:
        made = plan({"mix": PerHead(patterns=(NEAR, Radial(), Dense()), cycle=True)})
        assert made.names(0, 4, 0) == ("mix[0]", "mix[1]", "mix[2]", "mix[0]")
        made.check_model(MODEL)
        assert plan({"mix": PerHead(patterns=(Dense(),), cycle=True)}).names(0, 4, 0) is None

    def test_lists_of_the_plan(self) -> None:
        layout = Layout((3, 4, 6), before=2)
        mix = PerHead(patterns=(Neighborhood(window=(1, 3, 3)), Skip()), cycle=True)
        made = plan({"mix": mix})
        by_plan = [made.patterns[name].resolve(layout.grid) for name in made.names(0, 4, 0) or ()]
        assert compile_lists(by_plan, layout, block_q=16, block_k=32) is compile_lists(
            mix.heads(4), layout, block_q=16, block_k=32
        )

    def test_every_part_must_fit_the_grid(self) -> None:
        made = plan({"mix": PerHead(patterns=(Radial(), Neighborhood(window=9)), cycle=True)})
        with pytest.raises(ValueError, match="window: 9 with dilation 1 needs 9 tokens on the frames axis"):
            made.check_grid(MODEL, (8, 30, 52), None)
        with pytest.raises(ValueError, match="plan: pattern 'mix': window: 9 with dilation 1 needs 9 tokens"):
            replace(made, made_for=(8, 30, 52))

    @pytest.mark.parametrize(
        ("mix", "text"),
        [
            (PerHead(patterns=(NEAR,) * 3), "plan: pattern 'mix': .*got 3 patterns for 4 heads; give as many as heads"),
            (PerHead(patterns=(NEAR,) * 5), "plan: pattern 'mix': .*got 5 patterns for 4 heads; leave some out"),
        ],
    )
    def test_another_number_of_heads(self, mix: PerHead, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            plan({"mix": mix.to_dict()}).check_model(MODEL)

    def test_names_of_parts_are_taken(self) -> None:
        with pytest.raises(ValueError, match=r"pattern 'mix\[1\]' has the name of a part of 'mix'; give it another"):
            plan({"mix": self.MIX.to_dict(), "mix[1]": {"name": "dense"}})
        made = plan({"mix": self.MIX.to_dict(), "both": Union(patterns=(NEAR, Radial())).to_dict()})
        for name in ("mix[4]", "both[0]", "mux[0]"):
            with pytest.raises(KeyError):
                made.patterns[name]
        with pytest.raises(ValueError, match=r"there is no pattern 'mix\[1\]' in its table of patterns"):
            plan({"mix": self.MIX.to_dict()}, default="mix[1]")

    def test_it_has_no_pattern_of_its_own(self) -> None:
        with pytest.raises(ValueError, match="a list with one pattern per head has no single pattern"):
            PatternTemplate(self.MIX.to_dict()).resolve(LARGE)

    def test_bad_parts_name_their_place(self) -> None:
        entry = {"name": "per_head", "patterns": [{"name": "dense"}, {"name": "neighborhood", "window": 0}]}
        with pytest.raises(
            ValueError, match="plan: pattern 'mix': patterns, place 1: window: wanted at least 1, got 0"
        ):
            plan({"mix": entry})
        with pytest.raises(ValueError, match="'per_head' has an unknown key 'cycled'; did you mean 'cycle'"):
            plan({"mix": {"name": "per_head", "patterns": [{"name": "dense"}], "cycled": True}})
        with pytest.raises(ValueError, match="plan: pattern 'mix': patterns: wanted a tuple of patterns, got int 3"):
            plan({"mix": {"name": "per_head", "patterns": 3}})
