"""Climbing on the pipeline that ships: recorded, on all prompts, and the same after a stop."""

from typing import Any

import pytest
from diffusers import WanPipeline

import visparse
from visparse.head_search.judge import OutputJudge
from visparse.plan import SparsePlan
from visparse_pipelines import tiny_video_path

CALL = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0}
GIVEN: dict[str, Any] = {"prompts": ["a cat", "a dog", "a car"], "steps": 4, "rows": 2, "judge": 1, "dense_steps": 1}
GIVEN |= {"probe": False, "refresh": None, "refine": 7, "weigh": 2, "attention": 0.5, "share": 0.9, "call": CALL}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(tiny_video_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(a: SparsePlan, b: SparsePlan) -> bool:
    """Equal but for when they were made."""
    kept = [{**one.to_dict(), "measured": {**one.measured, "date": None, "predicted": None}} for one in (a, b)]
    return kept[0] == kept[1]


def test_what_is_left_of_refine_climbs(pipe: WanPipeline, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work.jsonl"
    judged: list[tuple[str, int]] = []
    errors = OutputJudge.errors

    def stopped(self: OutputJudge, plan: SparsePlan, label: str) -> Any:
        if label.startswith("climb 2"):
            raise KeyboardInterrupt
        found = errors(self, plan, label)
        judged.append((label, len(found or ())))
        return found

    monkeypatch.setattr(OutputJudge, "errors", stopped)
    with pytest.raises(KeyboardInterrupt):
        visparse.search(pipe, work=work, **GIVEN)
    assert judged[-1] == ("climb 1 of 3", 3)
    assert {count for _, count in judged} == {3}  # all prompts
    monkeypatch.setattr(OutputJudge, "errors", errors)
    found = visparse.search(pipe, work=work, **GIVEN)
    assert visparse.search(pipe, work=work, **GIVEN).to_dict() == found.to_dict()
    climb = found.measured["climb"]
    assert 1 <= len(climb["tried"]) <= 3
    assert set(climb["tried"][0]) == {"range", "layers", "factor", "error", "kept"}
    kept = [one["error"] for one in climb["tried"] if one["kept"]]
    assert climb["error"] == (kept[-1] if kept else 1.0)
    ways = found.measured["output_errors"]
    assert len(ways) <= 4
    assert kept or climb["output_error"] == ways[found.measured["taken"]]
    few = visparse.search(pipe, work=work, **{**GIVEN, "refine": 4})
    assert "climb" not in few.measured
    assert kept or same(few, SparsePlan.from_dict({**found.to_dict(), "measured": few.measured}))
