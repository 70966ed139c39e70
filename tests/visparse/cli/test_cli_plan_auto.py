"""`visparse run --plan auto`: the plan beside the model, and the record says which it was."""

import json

import pytest

from visparse.cli import main
from visparse.measure.results import Record
from visparse.plan import FILE_NAME, SparsePlan


@pytest.fixture
def plan_file(tiny_folder):
    yield tiny_folder / FILE_NAME
    (tiny_folder / FILE_NAME).unlink(missing_ok=True)


def test_run_with_the_plan_beside_the_model(tiny_folder, plan_file, tmp_path, capsys):
    shape = {"model_class": "WanTransformer3DModel", "layers": 2, "heads": 2, "head_dim": 16}
    near = {"name": "neighborhood", "window": [1, 3, 3]}
    plan = SparsePlan(name="mine", patterns={"near": near}, default="near")
    plan_file.write_text(json.dumps(plan.to_dict() | {"model": shape}))
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    base = ["run", "--model", str(tiny_folder), "--prompt", "a cat", *size, "--plan", "auto", "--compare", "dense"]
    assert main([*base, "--out", str(tmp_path)]) == 0
    note = f"auto: plan 'mine'; chosen by 'auto': {plan_file.resolve()}"
    assert f"note: {note}" in capsys.readouterr().out
    record = Record.read(tmp_path / "result.json")
    assert record.settings["notes"] == [note]
    assert record.rows[1]["density"] < 1
    plan_file.write_text("{")
    assert main([*base, "--out", str(tmp_path)]) == 1
    assert f"{FILE_NAME}: is not a complete JSON file" in capsys.readouterr().err
