"""`visparse plan explain`: the table, JSON, and what it refuses."""

import json

from visparse.cli import main
from visparse.explain import explain
from visparse.layout import Layout
from visparse.patterns import TopK
from visparse.plan import SparsePlan
from visparse.presets import load_plan
from visparse.rules import ModelFingerprint

SIZES = ["--layers", "4", "--heads", "2", "--head-dim", "64"]
MODEL = ModelFingerprint(model_class="any", layers=4, heads=2, head_dim=64)


def test_a_preset(capsys):
    arguments = ["plan", "explain", "radial", "--grid", "5,16,16", "--text", "7", *SIZES]
    wanted = explain(load_plan("radial"), MODEL, Layout((5, 16, 16), 7), 50)
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, **wanted.to_dict()}


def test_a_file_for_one_model(capsys, tmp_path):
    plan = SparsePlan(
        name="mine", patterns={"top": TopK()}, default="top", dense_steps=2, residual={"refresh": 0.5}, model=MODEL
    )
    plan.save_pretrained(tmp_path)
    arguments = ["plan", "explain", str(tmp_path), "--grid", "5,16,16"]
    assert main([*arguments, "--steps", "8"]) == 0
    out = capsys.readouterr().out
    assert "4 layers of 2 heads of 64" in out
    assert "dense, measured (top, residual)" in out
    assert main([*arguments, "--heads", "3"]) == 1
    assert "another model: heads 2, this model has 3" in capsys.readouterr().err


def test_what_is_missing(capsys):
    assert main(["plan", "explain", "radial", "--grid", "5,16,16", "--heads", "2"]) == 1
    assert "plan 'radial' is for any model; say which by --layers, --head-dim" in capsys.readouterr().err
    assert main(["plan", "explain", "radail", "--grid", "5,16,16", *SIZES]) == 1
    assert "did you mean 'radial'" in capsys.readouterr().err
