import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from visparse.cli import main
from visparse.cli.patterns import describe, parse_spec, triple
from visparse.estimates import estimate
from visparse.layout import Layout
from visparse.patterns import Neighborhood, Radial
from visparse.patterns.registry import PATTERNS

GRID = ["--grid", "3,8,12"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["patterns", *arguments]) == 0
    return capsys.readouterr().out


def test_list_has_one_line_for_every_registered_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == sorted(PATTERNS)
    radial = next(line for line in lines if line.startswith("radial "))
    assert "(variant=paper, decay=1.0, sink=True, block=128)" in radial
    assert "Radial Attention, arXiv 2506.19852, equation 4" in radial
    window = next(line for line in lines if line.startswith("neighborhood "))
    assert "(window, stride=1, dilation=1, causal=False)" in window
    entries = json.loads(output(capsys, "list", "--json"))["patterns"]
    assert [entry["name"] for entry in entries] == sorted(PATTERNS)
    assert next(entry for entry in entries if entry["name"] == "radial") == describe("radial")


def test_show_draws_and_estimates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "mask.png"
    arguments = ["show", "neighborhood", "window=2x3x5", *GRID, "--text", "7", "--png", str(picture), "--heads", "2"]
    text = output(capsys, *arguments)
    said = estimate(Neighborhood(window=(2, 3, 5)), Layout((3, 8, 12), 7), head_dim=64, heads=2)
    assert str(said) in text
    assert "keys that query (1, 4, 6) sees:\nt=0" in text
    assert "Q" in text
    assert text.endswith(f"picture: {picture}\n")
    assert Image.open(picture).width > 480
    found = json.loads(output(capsys, *arguments, "--json"))
    assert found["estimate"] == said.to_dict()
    assert found["pattern"] == Neighborhood(window=(2, 3, 5)).to_dict() | {"window": [2, 3, 5]}


def test_show_takes_a_query(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", "radial", *GRID, "--query", "2,0,1")
    assert "keys that query (2, 0, 1) sees:" in text
    assert main(["patterns", "show", "radial", *GRID, "--query", "3,0,1", "--png", "unused.png"]) == 1
    assert "query: wanted a place inside the grid" in capsys.readouterr().err
    assert not Path("unused.png").exists()


def test_compare_prints_one_table_and_one_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    specs = ["neighborhood:window=2,3,5,stride=1", "radial:sink=false", "skip"]
    picture = tmp_path / "all.png"
    text = output(capsys, "compare", *specs, *GRID, "--png", str(picture), "--device", "h200")
    lines = text.splitlines()
    assert lines[0] == "3x8x12 = 288 tokens, 24 heads of 128, batch 1, blocks 128x128"
    assert lines[1].split() == ["pattern", "density", "blocks", "full", "masked", "bound", "time", "order"]
    assert [line.split()[0] for line in lines[2:5]] == specs
    assert lines[4].split() == ["skip", "0.00%", "0.00%", "0", "0", "-", "0", "ms", "skipped"]
    said = estimate(Radial(sink=False), Layout((3, 8, 12)), device="h200")
    assert lines[3].split()[1:5] == [
        f"{said.density:.2%}",
        f"{said.block_density:.2%}",
        str(said.groups[0].full),
        str(said.groups[0].masked),
    ]
    assert f"{said.milliseconds:.3g} ms" in lines[3]
    assert "measured on NVIDIA H200" in lines[5]
    assert Image.open(picture).height > 3 * 288
    rows = json.loads(output(capsys, "compare", *specs, *GRID, "--device", "h200", "--json"))["rows"]
    assert [row["spec"] for row in rows] == specs
    assert rows[1]["estimate"] == said.to_dict()


def test_a_device_that_was_not_measured_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "compare", "radial", *GRID, "--device", "a100")
    assert "not measured" in text.splitlines()[2]
    assert "time not measured: a100 with head_dim 128 (measured:" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("radial", ("radial", {})),
        ("radial:variant=code,decay=0.2", ("radial", {"variant": "code", "decay": 0.2})),
        ("neighborhood:window=[3,5,5],stride=1", ("neighborhood", {"window": [3, 5, 5], "stride": 1})),
        ("neighborhood:window=3,5,5,stride=1x2x2", ("neighborhood", {"window": [3, 5, 5], "stride": [1, 2, 2]})),
    ],
)
def test_specs(text: str, wanted: tuple) -> None:
    assert parse_spec(text) == wanted
    assert triple("21x45x80") == (21, 45, 80)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["show", "radal", *GRID], "unknown pattern 'radal'.*did you mean 'radial'"),
        (["show", "radial", "decai=2", *GRID], "unknown key 'decai'; did you mean 'decay'"),
        (["show", "radial", "decay", *GRID], "decay: wanted FIELD=VALUE"),
        (["show", "neighborhood", *GRID], "lacks the key 'window'; give it a value"),
        (["compare", "neighborhood:window=9", *GRID], "window: 9 .* on the frames axis"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(["patterns", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("visparse patterns: ")
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=text):
        raise ValueError(error)


@pytest.mark.parametrize("arguments", [["show", "radial"], ["show", "radial", "--grid", "4,4"], []])
def test_wrong_usage_leaves_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["patterns", *arguments])
    assert stop.value.code == 2


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from visparse.cli import main\n"
        "try:\n    main(['patterns', 'show', '--help'])\n"
        "except SystemExit as stop:\n    print('code', stop.code)\n"
        "print('heavy', sorted({'torch', 'diffusers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "code 0\nheavy []" in done.stdout, done.stderr
