import json
import math
import subprocess

import pytest

from visparse.measure import environment
from visparse.measure.results import Record

ROW = {"plan": "dense", "seconds": 1.5, "steps": 3, "seed": 0, "dtype": "float32", "grid": [2, 4, 6]}


def record(**changes) -> Record:
    values = {
        "kind": "run",
        "device": {"type": "cpu", "name": "x"},
        "versions": {"torch": "2"},
        "date": "2026-01-31T12:00:00+00:00",
        "commit": None,
        "settings": {},
        "rows": [ROW],
    }
    return Record(**{**values, **changes})


def test_round_trip(tmp_path):
    path = record().write(tmp_path / "new" / "result.json")
    assert Record.read(path) == record()
    assert next(iter(json.loads(path.read_text()))) == "schema"


def test_collect_fills_in_where_and_when():
    made = Record.collect("run", {"a": 1}, [ROW])
    assert made.device["type"] == "cpu"
    assert made.device["threads"] >= 1
    assert made.versions["torch"]
    assert made.date.endswith("+00:00")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"schema": 2}, ValueError, "schema: this version of visparse reads 1, got 2; update visparse"),
        ({"kind": "runs"}, ValueError, "kind: wanted one of kernels, step, run, search, quality, got 'runs'"),
        ({"rows": []}, ValueError, "rows: wanted a list with at least one row, got none"),
        ({"rows": [{**ROW, "seconds": None}]}, ValueError, r"rows\[0\]: a row of kind 'run' needs 'seconds'"),
        ({"rows": [{**ROW, "psnr": math.inf}]}, ValueError, r"rows\[0\].psnr: wanted a finite number, got inf"),
        ({"rows": [{**ROW, "psnr": "31"}]}, TypeError, r"rows\[0\].psnr: wanted a number or null, got '31'"),
        ({"rows": [{**ROW, "tokens": 1.5}]}, TypeError, r"rows\[0\].tokens: wanted a whole number or null, got 1.5"),
        (
            {"rows": [{**ROW, "tokens": math.inf}]},
            TypeError,
            r"rows\[0\].tokens: wanted a whole number or null, got inf",
        ),
        ({"rows": [{**ROW, "grid": [4, 6]}]}, TypeError, r"rows\[0\].grid: wanted \[frames, height, width\]"),
        ({"rows": [{**ROW, "plan": 3}]}, TypeError, r"rows\[0\].plan: wanted text or null, got 3"),
        ({"date": "2026-01-31"}, ValueError, "date: wanted ISO 8601 with a time zone"),
        ({"device": "cpu"}, TypeError, "device: wanted a mapping, got str"),
        ({"commit": 7}, TypeError, "commit: wanted text or None, got int"),
    ],
)
def test_wrong_fields_are_named(changes, error, text):
    with pytest.raises(error, match=text):
        record(**changes)


def test_unknown_and_missing_keys_are_named():
    good = record().to_dict()
    with pytest.raises(ValueError, match="unknown key 'row'; did you mean 'rows'"):
        Record.from_dict({**good, "row": []})
    del good["commit"]
    with pytest.raises(ValueError, match="missing commit"):
        Record.from_dict(good)


def test_file_must_hold_an_object(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"wanted a JSON object, got list"):
        Record.read(path)


def test_commit_belongs_to_the_files_that_run(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "environment.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(environment, "__file__", str(source))
    git("init", "-q")
    assert environment.find_commit() is None, "an untracked copy inside a repository has no commit of its own"
    git("add", "environment.py")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    assert environment.find_commit() == commit
    source.write_text("x = 2\n")
    assert environment.find_commit() == commit + "-dirty"


def test_device_must_be_known():
    with pytest.raises(ValueError, match="device: wanted cpu or cuda, got 'meta'"):
        environment.describe_device("meta")
