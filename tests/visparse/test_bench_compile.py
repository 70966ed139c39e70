"""`visparse bench compile`: seconds and memory of compiling lists."""

import json

from visparse.bench.compile_lists import bench_compile, table_text
from visparse.cli import main


def test_rows_and_table():
    record = bench_compile("cpu", cases=["tiny"], patterns=["gna", "sta"], repeats=2)
    gna, sta = record.rows
    assert (gna["pattern"], sta["pattern"]) == ("gna", "sta")
    assert gna["seconds_min"] <= gna["seconds"] <= gna["seconds_max"]
    assert gna["repeats"] == 2
    assert gna["list_bytes"] > 0
    assert gna["peak_bytes"] is None or gna["peak_bytes"] >= 0
    assert 0 < gna["density"] <= gna["block_density"] < 1
    assert "window 2x8x8, stride 1 of 4x16x16" in table_text(record)
    assert "window 2x12x12, stride 2x4x4 of 4x16x16 (tiles of 2x4x4)" in table_text(record)


def test_every_run_starts_from_an_empty_cache():
    from visparse import compile as compiler

    bench_compile("cpu", cases=["tiny"], patterns=["gna"], repeats=3)
    assert compiler._compile.cache_info().misses == 1, "emptied before each run"
    assert compiler._compile.cache_info().hits == 0


def test_what_does_not_fit_is_listed():
    record = bench_compile("cpu", cases=["tiny", "s32768"], patterns=["gna"], seconds=0.0)
    assert [row["not_run"] for row in record.rows] == ["time", "a plain sequence has no window"]
    assert "not run: time" in table_text(record)


def test_command(tmp_path, capsys):
    out = tmp_path / "compile.json"
    argv = ["bench", "compile", "--device", "cpu", "--case", "tiny", "--pattern", "radial", "--repeats", "1"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "compiling block lists on" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["what"] == json.loads(out.read_text())["rows"][0]["what"]
