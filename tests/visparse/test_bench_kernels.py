"""`visparse bench kernels`: rows, table, files, and what happens where something is wrong, absent or too slow."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from visparse.bench import kernels
from visparse.bench.cases import Case, find_case
from visparse.bench.contenders.base import Contender
from visparse.bench.contenders.ours import Ours
from visparse.bench.contenders.registry import all_contenders
from visparse.bench.contenders.sdpa import Sdpa
from visparse.bench.group import DeviceLost
from visparse.bench.kernels import KernelSettings, bench_kernels
from visparse.bench.table import foot_text, group_text
from visparse.bench.timing import Deadline, Stopwatch, time_rounds
from visparse.cli import main
from visparse.measure.results import Record
from visparse_kernels import attend

CASE = Case(
    name="c",
    grid=(2, 12, 16),
    heads=2,
    head_dim=16,
    before=4,
    window=(1, 6, 8),
    stride=(1, 2, 4),
    patterns=("dense", "random_50", "gna"),
)
SETTINGS = KernelSettings(device="cpu", dtype="float32", cases=(CASE,), repeats=3, seconds=60, group_seconds=0.2)
DENSE = Sdpa("sdpa_default", None)


class Wrong(Contender):
    """Leaves out the scale."""

    name = "wrong"

    def can_run(self, problem):
        return None

    def prepare(self, problem):
        q, k, v = problem.inputs.q, problem.inputs.k, problem.inputs.v
        return lambda: attend(q, k, v, problem.plain.lists, scale=1.0)


class Raises(Wrong):
    name = "raises"

    def prepare(self, problem):
        raise RuntimeError("no kernel\nimage is available")


class Slow(Wrong):
    name = "slow"
    setup_seconds = 1e6


class Missing(Wrong):
    name = "missing"

    def absent(self):
        return "missing is not installed (pip install missing)"


class Refuses(Wrong):
    name = "refuses"

    def can_run(self, problem):
        return "bad hair day" if problem.pattern == "gna" else None


def run(contenders, settings=SETTINGS):
    groups = []
    record = bench_kernels(settings, contenders, lambda group, so_far: groups.append((list(group), so_far)))
    return record, groups


def rows_of(record, contender):
    return {row["pattern"]: row for row in record.rows if row.get("contender") == contender and "pattern" in row}


@pytest.fixture(scope="module")
def measured():
    return run([Ours("cpu"), Ours("reference"), DENSE])


def test_every_pattern_has_every_contender_beside_dense(measured):
    record, groups = measured
    assert record.kind == "kernels"
    assert [group[0]["pattern"] for group, _ in groups] == ["dense", "random_50", "gna"]
    for name in ("visparse:cpu", "visparse:reference", "sdpa_default"):
        assert set(rows_of(record, name)) == {"dense", "random_50", "gna"}
    assert [row["contender"] for row in record.rows if row.get("baseline")] == ["sdpa_default"] * 2
    assert groups[0][1].rows == tuple(groups[0][0]), "the record so far is there after every pattern"


def test_figures_follow_from_the_times(measured):
    record, _ = measured
    row, dense = rows_of(record, "visparse:cpu")["gna"], rows_of(record, "sdpa_default")["gna"]
    work = 4 * 388**2 * 16 * 2
    assert row["correct"] is True
    assert row["tokens"] == 388
    assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
    assert row["tflops"] == pytest.approx(work * row["density"] / row["milliseconds"] / 1e9)
    assert row["tflops_visited"] == pytest.approx(work * row["block_density"] / row["milliseconds"] / 1e9)
    assert row["ratio_to_fastest_dense"] == pytest.approx(dense["milliseconds"] / row["milliseconds"])
    assert row["rate_to_fastest_dense"] == pytest.approx(row["tflops"] / dense["tflops"])
    assert row["ideal"] == pytest.approx(1 / row["block_density"])
    assert row["density"] < row["block_density"] < 1
    assert row["ratio_to_cudnn"] is None
    assert (row["impl"], row["block_q"], row["block_k"], row["boxes"]) == ("cpu", 192, 32, False)
    assert row["compile_seconds"] > 0
    assert row["list_bytes"] > 0
    assert dense["density"] == dense["block_density"] == 1.0
    assert "compile_seconds" not in dense


def test_table(measured):
    record, groups = measured
    text = group_text(groups[2][0])
    assert text.splitlines()[0] == "c gna: window 1x6x8, stride 1 of 2x12x16"
    assert "388 tokens, 2 heads of 16, float32; density" in text.splitlines()[1]
    assert "sdpa_default (dense)" in text
    row = rows_of(record, "visparse:cpu")["gna"]
    assert f"{row['milliseconds']:.3f} {row['milliseconds_min']:.3f} to" in " ".join(text.split())
    assert "kept pairs only" in foot_text(record.rows)


def test_a_wrong_contender_gets_no_speed():
    record, groups = run([Ours("cpu"), DENSE, Wrong(), Raises()])
    for row in rows_of(record, "wrong").values():
        assert row["correct"] is False
        assert "worst at" in row["error"]
        assert not {"milliseconds", "tflops", "ratio_to_fastest_dense"} & set(row)
    assert rows_of(record, "raises")["gna"]["error"] == "RuntimeError: no kernel image is available"
    lines = [line for line in group_text(groups[1][0]).splitlines() if "wrong" in line]
    assert lines[0].startswith("  wrong: wrong, so no speed: out [batch")
    assert "milliseconds" in rows_of(record, "visparse:cpu")["gna"]


def test_a_wrong_dense_contender_is_no_baseline():
    class WrongDense(Wrong):
        name = "wrong_dense"
        dense = True

        def can_run(self, problem):
            return None if problem.pattern == "dense" else "dense only"

    record, _ = run([Ours("cpu"), WrongDense()])
    assert not any(row.get("baseline") for row in record.rows)
    assert rows_of(record, "visparse:cpu")["gna"]["ratio_to_fastest_dense"] is None


def test_absent_refusing_and_slow_contenders_are_listed():
    record, groups = run([Ours("cpu"), DENSE, Missing(), Refuses(), Slow()])
    assert record.rows[0] == {"contender": "missing", "absent": "missing is not installed (pip install missing)"}
    assert rows_of(record, "refuses")["gna"]["cannot_run"] == "bad hair day"
    assert {row["not_run"] for row in rows_of(record, "slow").values()} == {"time"}
    assert "  slow: not run: time" in group_text(groups[0][0])
    foot = foot_text(record.rows)
    assert "absent: missing: missing is not installed" in foot
    assert "cannot run: refuses: bad hair day (1: c gna...)" in foot


def test_what_does_not_fit_the_time_is_listed():
    record, _ = run([Ours("cpu"), DENSE], replace(SETTINGS, seconds=0.0))
    assert [(row["pattern"], row["not_run"]) for row in record.rows] == [
        ("dense", "time"),
        ("random_50", "time"),
        ("gna", "time"),
    ]
    assert "not run: time: c dense, c random_50, c gna" in foot_text(record.rows)


def test_a_case_that_is_too_large_for_the_time_is_not_begun():
    record, groups = run([Ours("cpu"), DENSE], replace(SETTINGS, cases=(find_case("wan14b_720p"),), patterns=("gna",)))
    assert [row["not_run"] for row in record.rows] == ["time", "time"]
    assert group_text(groups[0][0]) == "wan14b_720p dense: not run: time"


def test_a_pattern_that_a_case_has_not_is_listed():
    record, _ = run([Ours("cpu"), DENSE], replace(SETTINGS, patterns=("sta",)))
    assert record.rows[-1] == {"case": "c", "pattern": "sta", "not_run": "no tile is set that divides the grid"}


def test_after_a_lost_device_the_rest_is_listed(monkeypatch):
    def broken(*_):
        raise DeviceLost("fa3 broke the CUDA context: illegal address")

    monkeypatch.setattr(kernels, "measure_group", broken)
    record, _ = run([Ours("cpu"), DENSE])
    assert [row["not_run"] for row in record.rows] == ["fa3 broke the CUDA context: illegal address"] * 3


def test_lists_that_cannot_be_built_do_not_end_the_run():
    bad = replace(CASE, window=(9, 9, 9))
    record, groups = run([Ours("cpu"), DENSE], replace(SETTINGS, cases=(bad,)))
    assert "but the grid (2, 12, 16) has 2" in record.rows[-1]["error"]
    assert group_text(groups[-1][0]).startswith("c gna: wrong, so no speed: ValueError: window")
    assert "milliseconds" in rows_of(record, "visparse:cpu")["random_50"]


def test_rounds_are_shuffled_and_end_at_the_deadline():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    watch = Stopwatch("cpu")
    taken = time_rounds(calls, watch, rounds=8, deadline=Deadline(60), seed=1)
    assert {name: len(times) for name, times in taken.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = {tuple(order[i : i + 3]) for i in range(0, 24, 3)}
    assert len(rounds) > 2
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert time_rounds(calls, watch, rounds=8, deadline=Deadline(0), seed=1) == {"a": [], "b": [], "c": []}


def test_all_implementations_take_part():
    names = [one.name for one in all_contenders()]
    assert {"visparse:triton", "visparse:cpu", "visparse:reference"} <= set(names)
    assert len(set(names)) == len(names)


def test_command_writes_the_record_and_prints_a_table(tmp_path, capsys):
    out = tmp_path / "new" / "kernels.json"
    argv = [
        "bench",
        "kernels",
        "--device",
        "cpu",
        "--case",
        "tiny",
        "--pattern",
        "random_25",
        "--contender",
        "visparse",
    ]
    assert main([*argv, "--repeats", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "tiny random_25: 25.00% of the blocks of 192x32 of each row" in printed.out
    record = Record.read(out)
    assert record.settings["patterns"] == ["random_25"]
    assert rows_of(record, "visparse:cpu")["random_25"]["repeats"] == 3
    assert "sdpa_default" in rows_of(record, "sdpa_default")["dense"]["contender"], "baselines always take part"


def test_command_with_json_prints_nothing_else(capsys):
    argv = ["bench", "kernels", "--device", "cpu", "--case", "tiny", "--pattern", "dense", "--repeats", "3", "--json"]
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "kernels"
    absent = {row["contender"] for row in data["rows"] if "absent" in row}
    assert absent.isdisjoint({"visparse:cpu", "sdpa_default"})


def test_command_fails_where_visparse_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(Ours, "prepare", Wrong.prepare)
    argv = ["bench", "kernels", "--device", "cpu", "--case", "tiny", "--pattern", "dense", "--contender", "visparse"]
    assert main(argv) == 1
    assert "visparse:cpu: wrong, so no speed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--case", "flux2k"], "case: wanted one of .*; did you mean 'flux_2k'"),
        (["--pattern", "gnas"], "pattern: wanted one of .*; did you mean 'gna'"),
        (["--contender", "flexx"], "contender: wanted some of .*; did you mean 'flex'"),
    ],
)
def test_command_names_what_it_does_not_know(argv, text, capsys):
    import re

    assert main(["bench", "kernels", "--device", "cpu", *argv]) == 1
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_without_a_gpu_says_so(capsys):
    assert main(["bench", "kernels", "--device", "cuda"]) == 1
    assert "device: wanted cuda, but PyTorch sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_block_sizes_are_two_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--blocks", "128"])
    assert "wanted QUERIESxKEYS such as 128x64, got '128'" in capsys.readouterr().err


def test_help_of_the_command_imports_no_torch():
    code = (
        "import sys\nfrom visparse.cli import build_parser\nbuild_parser().format_help()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_on_a_gpu_every_implementation_is_right_and_has_a_rate():
    settings = replace(
        SETTINGS, device="cuda", dtype="bfloat16", cases=(replace(CASE, head_dim=64),), patterns=("partial_50", "gna")
    )
    record, _ = run([one for one in all_contenders() if one.dense or isinstance(one, Ours)], settings)
    assert [row for row in record.rows if "error" in row] == []
    for pattern in ("dense", "partial_50", "gna"):
        row = rows_of(record, "visparse:triton")[pattern]
        assert row["tflops"] > 0
        assert row["ratio_to_cudnn"] > 0
