"""The cost of a look at the overlap: the command writes a record, and the row says what was timed."""

from pathlib import Path

import pytest

from visparse.compensation import overlap_bench
from visparse.measure.results import Record


def test_a_row_says_what_was_timed() -> None:
    row = overlap_bench.measure((3, 24, 24), 2, 64, "cpu", repeats=2)
    assert (row["tokens"], row["heads"], row["head_dim"], row["dtype"]) == (1728, 2, 64, "float32")
    assert row["tiles_looked_at"] == 1
    assert row["tiles"] == 9  # of 192 queries
    assert row["milliseconds"] > 0
    assert row["share_of_dense"] == pytest.approx(row["milliseconds"] / row["dense_milliseconds"], rel=0.01)


def test_the_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(overlap_bench, "ON_CPU", (((2, 16, 16), 2, 64), ((1, 16, 16), 1, 64)))
    overlap_bench.main(["--repeats", "1", "--out", str(tmp_path / "overlap.json")])
    record = Record.read(tmp_path / "overlap.json")
    assert (record.kind, [row["tokens"] for row in record.rows]) == ("kernels", [512, 256])
    assert record.settings["share"] == 0.125
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["512 tokens, 2 heads of 64", "256 tokens, 1 heads of 64"]


def test_no_calls_are_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overlap_bench.main(["--repeats", "0"])
    assert "--repeats: wanted at least 1, got 0" in capsys.readouterr().err
