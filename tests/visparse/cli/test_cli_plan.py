"""`visparse plan show|diff|check|export` from the command line: output, exit codes, what they refuse."""

import csv
import json

import pytest
from PIL import Image

from visparse.cli import main
from visparse.patterns import Neighborhood, Skip
from visparse.plan import SparsePlan
from visparse.plan_view import shape_for, view_plan
from visparse.plan_view_export import resolved_plan
from visparse.plan_view_text import plan_text
from visparse.rules import ModelFingerprint

SHAPE = ModelFingerprint(model_class="WanTransformer3DModel", layers=2, heads=2, head_dim=16)
GRID = ["--grid", "2,4,6"]


def make(**changes):
    values = {"patterns": {"near": Neighborhood(window=(1, 3, 3)), "off": Skip()}, "default": "near", "model": SHAPE}
    return SparsePlan(**{"name": "mine", "assignment": [{"pattern": "off", "layers": 1}], **values, **changes})


@pytest.fixture
def file(tmp_path):
    return str(make().save_pretrained(tmp_path / "one"))


def failure(capsys, *arguments):
    assert main(["plan", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_show(capsys, file, tmp_path):
    view = view_plan(make(), shape_for(make()))
    assert main(["plan", "show", file]) == 0
    assert capsys.readouterr().out == plan_text(view) + "\n"
    picture = str(tmp_path / "plan.png")
    assert main(["plan", "show", "radial", "--layers", "3", "--heads", "2", "--png", picture]) == 0
    assert capsys.readouterr().out.endswith(f"\n\npicture: {picture}\n")
    with Image.open(picture) as image:
        assert image.size[0] >= 400
    assert main(["plan", "show", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, **view.to_dict()}
    assert "give --layers and --heads" in failure(capsys, "show", "radial", "--png", picture)


def test_diff(capsys, file, tmp_path):
    other = str(make(name="other").save_pretrained(tmp_path / "two").parent)
    assert main(["plan", "diff", file, file]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"
    assert main(["plan", "diff", file, other]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("name: 'mine' -> 'other'\n", "")
    assert main(["plan", "diff", file, other, "--json"]) == 1
    wanted = {"schema": 1, "equal": False, "changes": ["name: 'mine' -> 'other'"]}
    assert json.loads(capsys.readouterr().out) == wanted
    assert main(["plan", "diff", "radial", "dense", "--layers", "3", "--heads", "4"]) == 1
    assert "8 of 12 heads, all steps: radial -> dense: layers 1-2: heads 0-3\n" in capsys.readouterr().out


def test_check(capsys, file, tiny_folder):
    assert main(["plan", "check", file, "--model", str(tiny_folder), *GRID, "2,8,8", "--steps", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [
        "ok     file",
        "ok     model",
        "ok     run of 3 steps",
        "ok     grid 2x4x6",
        "ok     grid 2x8x8",
    ]
    assert main(["plan", "check", file]) == 0
    out = capsys.readouterr().out
    assert "note   no other model was checked than the plan's own; give --model" in out
    assert "note   no grid was checked: the plan names none; give --grid" in out
    assert main(["plan", "check", "radial", "--grid", "3,8,16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["ok"], found["checks"][-1]["what"]) == (1, True, "grid 3x8x16")
    assert found["notes"] == ["no model was checked: the plan is for any; give --model, or --layers and --heads"]


def test_check_takes_the_grids_of_the_plan(capsys, tmp_path):
    make(grids=[(2, 4, 6), (2, 8, 8)]).save_pretrained(tmp_path)
    assert main(["plan", "check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("ok     grid") == 2
    make(made_for=(2, 4, 8)).save_pretrained(tmp_path)
    assert main(["plan", "check", str(tmp_path)]) == 0
    assert "ok     grid 2x4x8" in capsys.readouterr().out


def test_check_says_what_does_not_fit(capsys, file, tiny_folder):
    shapes = ["--layers", "4", "--heads", "2", "--head-dim", "16", "--model-class", "WanTransformer3DModel"]
    line = failure(capsys, "check", file, *shapes, "--grid", "2,4,6", "2,2,2")
    assert line.startswith(
        f"visparse plan: {file} does not pass: model: the plan was made for another model: layers 2,"
    )
    assert "grid 2x2x2: pattern 'near': window: 3 with dilation 1 needs 3 tokens on the height axis" in line
    assert main(["plan", "check", file, *shapes, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    line = failure(capsys, "check", file, "--model", str(tiny_folder), "--layers", "2")
    assert "--model tells the whole shape, so it does not go with --layers" in line
    assert "is for any model; give --layers and --heads, or --model" in failure(
        capsys, "check", "radial", "--heads", "2"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:200], "is not a complete JSON file: "),
        (lambda text: "", "is not a complete JSON file: Expecting value: line 1 column 1"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), ": schema must be 1, got 2; this visparse reads"),
        (
            lambda text: text.replace('"default"', '"defualt"'),
            ": plan has an unknown key 'defualt'; did you mean 'default'",
        ),
        (lambda text: text.replace("neighborhood", "neighbourhood"), ": pattern 'near': "),
        (
            lambda text: text.replace('"heads": 2', '"heads": "2"'),
            ": model: heads must be an int of at least 1, got '2'",
        ),
        (
            lambda text: text.replace('"WanTransformer3DModel"', "[]"),
            ": model: model_class must be the name of a class",
        ),
        (lambda text: "[]", ": a plan must be a JSON object, got list"),
    ],
)
def test_damaged_files(capsys, file, change, reason):
    with open(file) as source:
        text = source.read()
    with open(file, "w") as target:
        target.write(change(text))
    for arguments in (["check", file], ["show", file], ["diff", "radial", file], ["export", file, *GRID]):
        line = failure(capsys, *arguments)
        assert line.startswith(f"visparse plan: {file}"), line
        assert reason in line
        assert line.count(file) == 1


def test_files_that_are_not_there(capsys, tmp_path):
    assert "unknown plan '" in failure(capsys, "check", str(tmp_path / "none.json"))
    assert "no plan at" in failure(capsys, "check", str(tmp_path))
    assert "plan 'auto' means the plan of a model, and here is none" in failure(capsys, "show", "auto")


def test_export(capsys, file, tmp_path):
    wanted = resolved_plan(make(), (2, 4, 6)).to_dict()
    for extra in ([], ["--json"]):
        assert main(["plan", "export", file, *GRID, *extra]) == 0
        assert json.loads(capsys.readouterr().out) == wanted
    out = tmp_path / "resolved.json"
    assert main(["plan", "export", file, *GRID, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    assert SparsePlan.from_pretrained(out).to_dict() == wanted
    assert "pattern 'near' on grid 2x2x2: window" in failure(
        capsys, "export", file, "--grid", "2,2,2", "--out", str(out)
    )
    assert SparsePlan.from_pretrained(out).to_dict() == wanted  # the earlier file is still there


def test_export_csv(capsys, file):
    assert main(["plan", "export", file, *GRID, "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["pattern"] for row in rows] == ["neighborhood"] * 2 + ["skip"] * 2
    assert (
        main(["plan", "export", "radial", "--grid", "3,8,16", "--format", "csv", "--layers", "2", "--heads", "3"]) == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 7
    line = failure(capsys, "export", "radial", *GRID, "--format", "csv")
    assert "plan 'radial' is for any model; say for which by --layers and --heads" in line
    assert "--json and --format csv ask for two forms" in failure(
        capsys, "export", file, *GRID, "--json", "--format", "csv"
    )
