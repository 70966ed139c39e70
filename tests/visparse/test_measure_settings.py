import json

import pytest

from visparse.measure.settings import PlanChoice, RunSettings, read_demo_settings


def settings(**changes):
    return RunSettings(**{"model": "m", "prompt": "p", **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"repeats": 0}, "repeats: wanted at least 1, got 0"),
        ({"height": -8}, "height: wanted at least 1, got -8"),
        ({"fps": 0}, "fps: wanted more than 0, got 0"),
        ({"compare": ["fewer"]}, "compare: wanted some of dense, fewer-steps, floor, got 'fewer'"),
        ({"plans": [PlanChoice(plan="dense")]}, "plans: 'dense' is always a row of its own"),
        ({"plans": [PlanChoice(plan="radial")] * 2}, "plans: 'radial' is there twice; give each a label"),
    ],
)
def test_wrong_settings_are_named(changes, text):
    with pytest.raises(ValueError, match=text):
        settings(**changes)


@pytest.mark.parametrize("name", ["plan", "target"])
def test_what_no_plan_can_override(name):
    with pytest.raises(ValueError, match=f"overrides of 'radial': '{name}' cannot be overridden"):
        PlanChoice(plan="radial", overrides={name: 1})


def test_settings_are_plain_json():
    made = settings(plans=(PlanChoice(plan="a/radial.json", overrides={"dense_steps": 1}),))
    data = json.loads(json.dumps(made.to_dict()))
    assert data["plans"] == [{"plan": "a/radial.json", "label": None, "overrides": {"dense_steps": 1}}]
    assert made.plans[0].name == "radial"


def write(folder, **data):
    (folder / "visparse_demo.json").write_text(json.dumps(data))


def test_file_beside_a_model(tmp_path):
    assert read_demo_settings(tmp_path) == {}
    plans = [{"plan": "radial", "label": "r", "overrides": {"decay": 0.5}}, {"plan": "mine.json"}]
    write(tmp_path, schema=1, prompt="p", height=32, plans=plans)
    assert read_demo_settings(tmp_path) == {
        "prompt": "p",
        "height": 32,
        "plans": (
            PlanChoice(plan="radial", label="r", overrides={"decay": 0.5}),
            PlanChoice(plan=str(tmp_path / "mine.json")),
        ),
    }


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"prompt": "p"}, 'wanted a JSON object with "schema": 1'),
        ({"schema": 2}, 'wanted a JSON object with "schema": 1'),
        ({"schema": 1, "promt": "p"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"schema": 1, "plans": [{"label": "r"}]}, r'plans\[0\]: wanted an object with a "plan"'),
        ({"schema": 1, "plans": [{"plan": "r", "override": {}}]}, "unknown key 'override'; did you mean 'overrides'"),
    ],
)
def test_wrong_file_is_named(tmp_path, data, text):
    write(tmp_path, **data)
    with pytest.raises(ValueError, match=text):
        read_demo_settings(tmp_path)


def test_file_that_is_not_json(tmp_path):
    (tmp_path / "visparse_demo.json").write_text("{")
    with pytest.raises(ValueError, match=r"visparse_demo.json: not JSON"):
        read_demo_settings(tmp_path)
