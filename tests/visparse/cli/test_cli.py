import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from visparse.cli import main
from visparse.cli.options import assignment, overrides_of
from visparse.measure.results import Record

SIZE = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "3", "--guidance", "1", "--device", "cpu"]
NEAR = ["--plan", "neighborhood", "--set", "neighborhood:window=[1,3,3]", "--set", "stride=1", "--set", "dense_steps=1"]


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "visparse.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_whole_path_in_a_process_of_its_own(tiny_folder, tmp_path):
    done = run_process("run", "--model", str(tiny_folder), "--prompt", "a cat", *SIZE, *NEAR, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = Record.from_dict(json.loads(done.stdout))
    assert [row["plan"] for row in record.rows][:2] == ["dense", "neighborhood"]
    folder = tmp_path / "visparse_out" / "tiny_random"
    assert Record.read(folder / "result.json") == record
    assert "<html" in (folder / "index.html").read_text()
    assert done.stderr.strip().endswith("index.html")


def test_help_of_the_commands_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\n"
        "from visparse.cli import main\n"
        "try:\n    main(['run', '--help'])\n"
        "except SystemExit as stop:\n    print('code', stop.code)\n"
        "print('heavy', sorted({'torch', 'diffusers', 'transformers', 'PIL', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "code 0\nheavy []" in done.stdout, done.stderr


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: visparse [-h] [--version] COMMAND ...")
    assert all(f"\n    {name} " in text for name in ("env", "demo", "run"))
    assert "VISPARSE_DEBUG=1" in text
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    options = (
        "model prompt plan set compare steps height width frames guidance seed device dtype out json repeats verbose"
    )
    assert all(f"--{name}" in text for name in options.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("visparse 0.")


def test_wrong_usage_leaves_with_2(capsys, tiny_folder):
    base = ["run", "--model", "m", "--prompt", "p"]
    assert "COMMAND" in usage_error(capsys)
    assert "invalid choice: 'rum'" in usage_error(capsys, "rum")
    assert "--prompt" in usage_error(capsys, "run", "--model", "m")
    assert "wanted a whole number of at least 1, got '0'" in usage_error(capsys, *base, "--steps", "0")
    assert "wanted some of dense,fewer-steps,floor, got 'few'" in usage_error(capsys, *base, "--compare", "few")
    assert "wanted KEY=VALUE or PLAN:KEY=VALUE, got 'x'" in usage_error(capsys, *base, "--set", "x")
    assert "radial2:a: no such --plan; given: radial" in usage_error(capsys, *base, "--set", "radial2:a=1")


def test_failure_is_one_line_and_1(capsys, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("VISPARSE_DEBUG", raising=False)
    arguments = [
        "run",
        "--model",
        str(tiny_folder),
        "--prompt",
        "p",
        *SIZE,
        "--out",
        str(tmp_path),
        "--plan",
        "radiall",
    ]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("visparse run: ")
    assert "radiall" in line
    assert "'radial'" in line
    assert "Traceback" not in shown.err
    assert main([*arguments, "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set", "decya=2"], "unknown key 'decya'; did you mean 'decay'? (known: variant, decay, sink, block, dense"),
        (["--set", "plan=dense"], "overrides of 'radial': 'plan' cannot be overridden; choose the plan by its name"),
        (["--plan", "dense"], "plans: 'dense' is always a row of its own; name sparse plans only"),
        (["--plan", "radial", "--plan", "radial"], "'radial' is there twice; give each a label, or its file a name"),
        (["--plan", "neighborhood", "--set", "window=-1"], "window: wanted at least 1, got -1; count it in tokens"),
        (
            ["--plan", "neighborhood", "--set", "window=[99,1,1]", "--set", "stride=1"],
            "window: 99 with dilation 1 needs 99 tokens on the frames axis, but the grid",
        ),
        (["--fps", "0"], "fps: wanted more than 0, got 0.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, tiny_folder, tmp_path, arguments, text):
    base = ["run", "--model", str(tiny_folder), "--prompt", "p", *SIZE, "--out", str(tmp_path)]
    assert main([*base, *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert text in shown.err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_cuda_where_there_is_none(capsys, monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = ["run", "--model", str(tiny_folder), "--prompt", "p", *SIZE, "--out", str(tmp_path)]
    assert main([*base, "--device", "cuda"]) == 1
    assert "device: wanted cuda, but torch sees no CUDA device; use cpu" in capsys.readouterr().err


def test_unexpected_error_names_its_type(capsys, monkeypatch):
    monkeypatch.setattr("visparse.cli.env.find_environment", lambda: {}["versions"])
    monkeypatch.delenv("VISPARSE_DEBUG", raising=False)
    assert main(["env"]) == 1
    wanted = "visparse env: KeyError: 'versions' (set VISPARSE_DEBUG=1 for the traceback)"
    assert capsys.readouterr().err.strip() == wanted


def test_missing_model_folder(capsys, tmp_path):
    assert main(["run", "--model", str(tmp_path / "none"), "--prompt", "p", "--out", str(tmp_path / "o")]) == 1
    assert "wanted a folder or a hub id" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("```text\n")
    assert text.rstrip().endswith("```")
    assert "attend on cpu" in text
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert facts["devices"][0]["type"] == "cpu"
    known = {one["impl"]: one for one in facts["attend"]["cpu"]}
    assert known["reference"]["runs"] is True
    assert known["triton"]["reason"]


def test_assignments():
    assert assignment("dense_steps=2") == (None, "dense_steps", 2)
    assert assignment("radial:decay=0.5") == ("radial", "decay", 0.5)
    assert assignment("plans/mine.json:window=[1,3,3]") == ("plans/mine.json", "window", [1, 3, 3])
    assert assignment("variant=code") == (None, "variant", "code")
    given = [(None, "a", 1), ("x", "a", 2), ("y", "b", 3)]
    assert overrides_of("x", given) == {"a": 2}
    assert overrides_of("y", given) == {"a": 1, "b": 3}


@pytest.fixture
def shipped(tiny_folder, monkeypatch):
    """The tiny random pipeline in place of the model that ships."""
    monkeypatch.setattr("visparse_pipelines.tiny_video_path", lambda: tiny_folder, raising=False)
    path = tiny_folder / "visparse_demo.json"
    yield path
    path.unlink(missing_ok=True)


def test_demo_takes_everything_from_the_settings_file(shipped, tmp_path, capsys):
    overrides = {"window": [1, 3, 3], "stride": 1, "dense_steps": 1}
    settings = {
        "schema": 1,
        "prompt": "a duck",
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 5,
        "fps": 4,
        "plans": [{"plan": "neighborhood", "label": "near", "overrides": overrides}],
    }
    shipped.write_text(json.dumps(settings))
    assert main(["demo", "--steps", "2", "--compare", "dense", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "near" in text
    assert "page: " in text
    record = Record.read(tmp_path / "result.json")
    assert [row["label"] for row in record.rows] == ["dense", "near"]
    assert (record.rows[0]["prompt"], record.rows[0]["seed"], record.rows[0]["steps"]) == ("a duck", 5, 2)
    assert record.settings["fps"] == 4


def test_run_takes_sizes_but_no_plans_from_the_settings_file(shipped, tmp_path):
    settings = {
        "schema": 1,
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }
    shipped.write_text(json.dumps({**settings, "prompt": "a duck", "plans": [{"plan": "radial"}]}))
    arguments = ["run", "--model", str(shipped.parent), "--prompt", "a cow", *NEAR, "--compare", "dense"]
    assert main([*arguments, "--set", "dense_steps=0", "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = Record.read(tmp_path / "result.json")
    assert record.settings["height"] == 32
    assert record.rows[0]["prompt"] == "a cow"
    assert [row["plan"] for row in record.rows] == ["dense", "neighborhood"]


def test_demo_without_its_model_says_what_to_do(shipped, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("visparse_pipelines.tiny_video_path", lambda: tmp_path / "none")
    assert main(["demo"]) == 1
    assert "is not in this installation; install the wheel, or use `visparse run" in capsys.readouterr().err
    monkeypatch.setattr("visparse_pipelines.tiny_video_path", lambda: shipped.parent)
    assert main(["demo"]) == 1
    assert "visparse_demo.json: wanted a prompt and plans" in capsys.readouterr().err


def test_progress_setting(monkeypatch):
    from visparse.cli.progress import Bar, wants_bar

    monkeypatch.setattr(
        sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    )
    monkeypatch.delenv("VISPARSE_PROGRESS", raising=False)
    assert wants_bar()
    bar = Bar()
    bar.expect(3)
    bar.tick()
    assert (bar._bar.n, bar._bar.total) == (1, 3)
    bar.close()
    monkeypatch.setenv("VISPARSE_PROGRESS", "0")
    assert not wants_bar()
    monkeypatch.setenv("VISPARSE_PROGRESS", "no")
    with pytest.raises(ValueError, match="VISPARSE_PROGRESS: wanted 0 or 1, got 'no'"):
        wants_bar()


def test_runs_from_a_source_tree_that_is_not_installed():
    code = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'visparse': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from visparse.cli import main\n"
        "raise SystemExit(main(['env', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
