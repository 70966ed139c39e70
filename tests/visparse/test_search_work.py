"""The work file: goes on after a stop, drops a line that was cut short, refuses another search."""

import pytest

from visparse.head_search.settings import SearchSettings, read_prompts
from visparse.head_search.work import WorkFile

SETTINGS = {"seed": 0, "prompts": ["a cat"]}
KEY = (0, 3, "model:cond", 0, 1)


def filled(path):
    work = WorkFile(path, SETTINGS)
    work.note({"share": 1 / 3})
    work.score(KEY, {"error": [[0.1, None], None]})
    work.finish(0)
    return work


def test_what_was_written_is_read_again(tmp_path):
    first = filled(tmp_path / "deep" / "a.jsonl")
    again = WorkFile(tmp_path / "deep" / "a.jsonl", SETTINGS)
    assert (again.facts, again.scores, again.done) == (first.facts, first.scores, first.done)
    assert again.scores == {KEY: {"error": [[0.1, None], None]}}
    assert again.facts["share"] == 1 / 3
    assert WorkFile(None, SETTINGS).scores == {}


def test_a_last_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = WorkFile(path, SETTINGS)
    assert again.done == set()
    assert again.scores.keys() == {KEY}
    again.finish(0)
    assert path.read_bytes() == whole


def test_another_search_and_damage_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    filled(path)
    with pytest.raises(ValueError, match=r"a.jsonl: it belongs to a search with seed=0, this one has 1; search again"):
        WorkFile(path, {**SETTINGS, "seed": 1})
    before = path.read_bytes()
    path.write_bytes(before.replace(b'{"facts', b"{facts", 1))
    with pytest.raises(ValueError, match="line 2 is damaged; delete the file to begin again"):
        WorkFile(path, SETTINGS)
    path.write_text('{"schema": 1}\n')
    with pytest.raises(ValueError, match="wanted one of visparse search, form 1; give another path"):
        WorkFile(path, SETTINGS)


def test_a_search_that_was_refused_before_it_scored_leaves_nothing_in_the_way(tmp_path):
    path = tmp_path / "a.jsonl"
    WorkFile(path, SETTINGS).note({"share": 0.5})
    again = WorkFile(path, {**SETTINGS, "seed": 1})
    assert again.facts == {}
    again.score(KEY, {"error": []})
    assert WorkFile(path, {**SETTINGS, "seed": 1}).scores.keys() == {KEY}
    with pytest.raises(ValueError, match="belongs to a search with seed=1, this one has 0"):
        WorkFile(path, SETTINGS)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"goal: wanted exactly one of speedup, .*, got none"):
        SearchSettings()
    with pytest.raises(ValueError, match="got speedup and density"):
        SearchSettings(speedup=2.0, density=0.5)
    for bad, text in (
        ({"speedup": 1.0}, "speedup: wanted more than 1, got 1.0"),
        ({"attention": 1.5}, r"attention: wanted a share in \(0, 1\]"),
        ({"max_error": 2.0}, r"max_error: wanted a relative error in \(0, 1\), got 2.0"),
        ({"attention": 0.5, "family": "fovea"}, "family: wanted best, plain, foveal, pooled, got 'fovea'.*foveal"),
        ({"attention": 0.5, "rule": "vdit"}, "rule: wanted one of budget, sparse-vdit, got 'vdit'"),
        ({"attention": 0.5, "rule": "sparse-vdit"}, "the published one has no budget"),
        ({"attention": 0.5, "dense_steps": -1}, "dense_steps: wanted an int of at least 0"),
        ({"attention": 0.5, "dense_steps": 0, "family": "foveal"}, "what it reuses is measured at the last dense step"),
        ({"attention": 0.5, "refine": -1}, "refine: wanted an int of at least 0, got -1"),
        ({"attention": 0.5, "weigh": 4}, "weigh: it is judged by the model's output, which needs refine"),
        ({"attention": 0.5, "refine": 1, "try_dense_steps": (2,)}, "try_dense_steps: .* give the goal as speedup"),
        ({"attention": 0.5, "ranges": 1}, "ranges: wanted True or False, got 1"),
        ({"attention": 0.5, "every": 3}, "every: wanted 1, 2 or 4"),
        ({"attention": 0.5, "minutes": 0.0}, "minutes: wanted more than 0"),
        ({"attention": 0.5, "prompts": ("a", " ")}, "prompts: wanted texts that are not empty"),
        ({"attention": 0.5, "judge": 0}, "judge: wanted an int of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            SearchSettings(**bad)
    assert SearchSettings(rule="sparse-vdit").families == ("plain",)


def test_prompts_come_from_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts: no file .*none.txt; wanted a text file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    (tmp_path / "p.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p.txt holds no prompt; write one a line"):
        read_prompts(tmp_path / "p.txt")
