"""Plans: selection of patterns, JSON round trip, every refusal with its text."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visparse.patterns import Neighborhood
from visparse.plan import FILE_NAME, SparsePlan
from visparse.presets import PRESETS, load_plan
from visparse.ranges import edges, largest, parse_selector, selects
from visparse.rules import ModelFingerprint, Rule
from visparse.templates import PatternTemplate

MODEL = ModelFingerprint(model_class="WanTransformer3DModel", layers=4, heads=3, head_dim=64)
PATTERNS = {
    "near": PatternTemplate({"name": "neighborhood", "window": ["50%", 3, 3]}),
    "all": PatternTemplate({"name": "dense"}),
    "none": PatternTemplate({"name": "skip"}),
}


def make(**fields):
    return SparsePlan(**{"name": "mine", "patterns": PATTERNS, "default": "near"} | fields)


FULL = make(
    assignment=(Rule(pattern="all", layers="2:", heads=[0, 2]), Rule(pattern="none", layers=3, heads=1, steps="5:9")),
    dense_steps=0.25,
    dense_layers=[0],
    model=MODEL,
    grids=((9, 32, 32), (5, 16, 16)),
    notes="hand-made",
    measured={"device": "none", "rows": [1, 2.5, None]},
)


@pytest.mark.parametrize("plan", [FULL, make(), *(preset() for preset in PRESETS.values())], ids=lambda plan: plan.name)
def test_round_trip_through_json_and_files(plan, tmp_path):
    assert SparsePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    file = plan.save_pretrained(tmp_path / "deep" / "folder")
    assert file.name == FILE_NAME
    assert SparsePlan.from_pretrained(file) == plan
    assert load_plan(tmp_path / "deep" / "folder") == plan
    assert load_plan(str(file)) == plan
    assert plan.name in plan.describe()


def test_names_by_layer_head_and_stage():
    assert FULL.names(0, 3, 0) is None
    assert FULL.names(1, 3, 0) == ("near", "near", "near")
    assert FULL.names(2, 3, 0) == ("all", "near", "all")
    assert FULL.names(3, 3, FULL.stage(6, 8)) == ("all", "none", "all")
    assert FULL.names(3, 3, FULL.stage(4, 8)) == ("all", "near", "all")
    assert FULL.names(3, 3, FULL.stage(1, 8)) is None
    assert make(default="all").names(1, 3, 0) is None


def test_stages_change_only_where_the_plan_changes():
    assert [FULL.stage(step, 12) for step in range(12)] == [-1, -1, -1, 3, 3, 5, 5, 5, 5, 9, 9, 9]
    assert FULL.last_stage(12) == 9
    assert [make().stage(step, None) for step in (0, 3)] == [0, 0]


@pytest.mark.parametrize(
    ("share", "total", "steps"), [(0.24, 50, 12), (0.24, 10, 2), (0.25, 10, 3), (0.3, 50, 15), (0.0, 9, 0)]
)
def test_share_of_steps(share, total, steps):
    assert make(dense_steps=share).first_sparse_step(total) == steps


def test_share_of_steps_without_their_number():
    with pytest.raises(ValueError, match=r"dense_steps=0.24 is a share.*sparsify\(\.\.\., dense_steps=3\)"):
        make(dense_steps=0.24).first_sparse_step(None)


@given(st.integers(0, 20), st.integers(0, 20), st.lists(st.integers(0, 20), min_size=1))
def test_selectors_agree_with_their_meaning(a, b, indices):
    cases = [
        ("all", range(25)),
        (a, [a]),
        (list(indices), indices),
        (f"{a}:", range(a, 25)),
        (f":{b + 1}", range(b + 1)),
    ]
    if a < b:
        cases.append((f"{a}:{b}", range(a, b)))
    for text, wanted in cases:
        selector = parse_selector(text, "x")
        assert [i for i in range(25) if selects(selector, i)] == sorted(set(wanted))
        changes = {i for i in range(1, 25) if selects(selector, i) != selects(selector, i - 1)}
        assert changes <= edges(selector)
        assert largest(selector) == (-1 if text == "all" else a if text == f"{a}:" else max(wanted))


@pytest.mark.parametrize("bad", [-1, True, 1.5, "", "3", "5:5", "5:2", "a:b", [], [-1], [True], None])
def test_bad_selectors(bad):
    with pytest.raises(ValueError, match="layers must be 'all', an index >= 0"):
        parse_selector(bad, "layers")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"schema": None}, "schema must be 1, got None"),
        ({"denselayers": 1}, "unknown key 'denselayers'; did you mean 'dense_layers'"),
        ({"schema": True}, "schema must be 1, got True"),
        (
            {"default": "nearr"},
            r"there is no pattern 'nearr' in its table of patterns; did you mean 'near'\? \(known: near",
        ),
        ({"default": ["near"]}, r"there is no pattern \['near'\]"),
        (
            {"patterns": {"near": {"name": "neighborhood"}}},
            "pattern 'near': .* lacks the key 'window'; give it a value",
        ),
        ({"assignment": None}, "assignment must be a list, got None"),
        ({"assignment": [5]}, "rule 0 must be a JSON object such as .*, got 5"),
        ({"grids": 5}, "grids must be a list, got 5"),
        ({"notes": 5}, "notes must be text, got 5"),
        ({"measured": None}, "measured must be a JSON object, got None"),
        ({"patterns": {}}, "patterns is empty"),
        ({"patterns": {"near": {"name": "neighbourhood"}}}, "pattern 'near': .*neighborhood"),
        (
            {"patterns": {"near": {"name": "neighborhood", "window": -2}}},
            "pattern 'near': window: wanted at least 1, got -2",
        ),
        ({"patterns": {"near": 3}}, "pattern 'near' must be a JSON object"),
        ({"assignment": [{"pattern": "near", "layer": 1}]}, "rule 0 has an unknown key 'layer'; did you mean 'layers'"),
        ({"assignment": [{"layers": 1}]}, "rule 0: the key 'pattern' is missing"),
        ({"assignment": [{"pattern": "near", "heads": -1}]}, "rule 0: a rule's heads must be"),
        ({"dense_steps": -1}, "dense_steps must be a number of steps"),
        ({"dense_steps": 1.0}, "dense_steps must be a number of steps"),
        ({"dense_layers": -1}, "dense_layers must be"),
        ({"grids": [[1, 2]]}, "a grid must be three ints > 0"),
        ({"model": {"model_class": "A"}}, "model lacks the key 'layers'"),
        ({"name": ""}, "name must be a non-empty string"),
    ],
)
def test_bad_plans(change, text):
    with pytest.raises(ValueError, match=text):
        SparsePlan.from_dict(FULL.to_dict() | change)


@pytest.mark.parametrize("key", ["name", "patterns", "default"])
def test_missing_keys(key):
    data = FULL.to_dict()
    del data[key]
    with pytest.raises(ValueError, match=f"the key '{key}' is missing"):
        SparsePlan.from_dict(data)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no plan at .*wanted a JSON file, or a folder"):
        SparsePlan.from_pretrained(tmp_path)
    file = FULL.save_pretrained(tmp_path)
    file.write_text(file.read_text()[:60])
    with pytest.raises(ValueError, match=r"not a complete JSON file: .*line \d+ column \d+"):
        SparsePlan.from_pretrained(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        SparsePlan.from_pretrained(file)


def test_another_model():
    FULL.check_model(MODEL)
    with pytest.raises(ValueError, match="another model: layers 4, this model has 30"):
        FULL.check_model(replace(MODEL, layers=30, heads=12))
    free = replace(FULL, model=None)
    with pytest.raises(ValueError, match=r"rule 1 names layer 3, this model has 3 layers \(0 to 2\)"):
        free.check_model(replace(MODEL, layers=3))
    with pytest.raises(ValueError, match=r"rule 0 names head 2, this model has 2 heads \(0 to 1\)"):
        free.check_model(replace(MODEL, heads=2))
    with pytest.raises(ValueError, match="dense_layers reaches layer 4, this model has 4 layers"):
        make(dense_layers=5).check_model(MODEL)


def test_changes():
    changed = load_plan("neighborhood").with_changes(window=(3, 5, 5), stride=1, dense_steps=2, dense_layers=[1])
    assert changed.patterns["neighborhood"].resolve((9, 9, 9)) == Neighborhood(window=(3, 5, 5))
    assert (changed.dense_steps, changed.dense_layers) == (2, (1,))
    assert changed.notes.endswith("as shares of the axes; changed: window, stride, dense_steps, dense_layers")
    assert load_plan("neighborhood").with_changes() == load_plan("neighborhood")
    with pytest.raises(ValueError, match="unknown key 'windw'; did you mean 'window'"):
        load_plan("neighborhood").with_changes(windw=3)
    with pytest.raises(ValueError, match="unknown key 'imp'; did you mean 'impl'"):
        load_plan("dense").with_changes(("impl",), imp="cpu")
    two = make(patterns={**PATTERNS, "far": PatternTemplate({"name": "neighborhood", "window": 5})})
    with pytest.raises(ValueError, match=r"'window' cannot be set: the plan has several patterns \(near, far\)"):
        two.with_changes(window=3)


def test_patterns_and_rules_may_come_as_they_are():
    plain = make(patterns={**PATTERNS, "far": Neighborhood(window=5), "wide": {"name": "neighborhood", "window": 7}})
    assert plain.patterns["far"].resolve((9, 9, 9)) == Neighborhood(window=5)
    assert plain.patterns["wide"].resolve((9, 9, 9)) == Neighborhood(window=7)
    assert make(assignment=[{"pattern": "near", "heads": [0]}]).assignment == (Rule(pattern="near", heads=[0]),)


def test_a_number_beside_shares_is_judged_on_the_grid_at_hand():
    """On a large grid the preset's stride is wider than this window, on this one it is not."""
    template = load_plan("neighborhood").with_changes(window=9).patterns["neighborhood"]
    assert template.resolve((9, 32, 32)) == Neighborhood(window=9, stride=(4, 8, 8))
    with pytest.raises(ValueError, match="got stride 16 and window 9 on frames"):
        template.resolve((30, 48, 80))
    with pytest.raises(ValueError, match="window: wanted at least 1, got -9"):
        load_plan("neighborhood").with_changes(window=-9)


def test_shares_of_the_grid():
    template = PatternTemplate({"name": "neighborhood", "window": ["50%", "30%/8", 3]})
    assert template.resolve((9, 80, 7)) == Neighborhood(window=(5, 24, 3))
    assert template.resolve((1, 5, 3)) == Neighborhood(window=(1, 5, 3))
    for bad, text in (
        ("0%", "up to 100%"),
        ("101%", "up to 100%"),
        ("5 %", "looks like '30%'"),
        ("5%/0", "looks like"),
    ):
        with pytest.raises(ValueError, match=text):
            PatternTemplate({"name": "neighborhood", "window": [bad, 3, 3]})
    with pytest.raises(ValueError, match="list of three"):
        PatternTemplate({"name": "neighborhood", "window": "50%"})


def test_published_presets():
    near = load_plan("neighborhood").patterns["neighborhood"]
    assert near.resolve((30, 48, 80)) == Neighborhood(window=(18, 24, 24), stride=(16, 8, 8))
    for grid in ((1, 1, 1), (1, 7, 13), (2, 5, 3), (9, 32, 32), (21, 45, 80)):
        near.resolve(grid)
    radial = load_plan("radial")
    assert (radial.first_sparse_step(50), radial.dense_layers) == (12, 1)
    assert radial.patterns["radial"].to_dict() == {
        "name": "radial",
        "variant": "code",
        "decay": 0.2,
        "sink": True,
        "block": 128,
    }


def test_unknown_plans():
    with pytest.raises(ValueError, match="unknown plan 'radail'; did you mean 'radial'"):
        load_plan("radail")
    with pytest.raises(ValueError, match=r"presets: dense, .*neighborhood, radial.*; or the path"):
        load_plan("zzz")
    with pytest.raises(TypeError, match="name of a preset, a path or a SparsePlan, got int"):
        load_plan(3)
    with pytest.raises(TypeError, match=r"got dict; SparsePlan.from_dict reads a dict"):
        load_plan({"schema": 1})
