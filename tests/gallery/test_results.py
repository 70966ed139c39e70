"""Every committed result has the one form in which results are kept."""

from pathlib import Path

import pytest

from visparse.measure.results import Record

RESULTS = Path(__file__).parents[2] / "gallery" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_result_can_be_read(path: Path) -> None:
    record = Record.read(path)
    assert record.device["name"]
    assert record.versions["torch"]
    assert record.rows
