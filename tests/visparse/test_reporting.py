"""The report's arithmetic and text, on a hand-made session."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from visparse.compensation.tiles import tiles_for
from visparse.layout import Layout
from visparse.patterns import Neighborhood
from visparse.plan import SparsePlan
from visparse.reporting import make_report
from visparse.route import LayerStats
from visparse.router import Router
from visparse.rules import ModelFingerprint, Rule
from visparse.settings import Settings
from visparse.steps import Clock
from visparse.templates import PatternTemplate

MODEL = ModelFingerprint(model_class="Toy", layers=3, heads=2, head_dim=8)
PLAN = SparsePlan(
    name="toy",
    patterns={"near": PatternTemplate({"name": "neighborhood", "window": [1, 4, 4], "stride": [1, 4, 4]})}
    | {"all": PatternTemplate({"name": "dense"})},
    default="near",
    assignment=(Rule(pattern="all", layers=2),),
    dense_layers=1,
)


@pytest.fixture
def session(monkeypatch):
    monkeypatch.delenv("VISPARSE_IMPL", raising=False)
    settings = Settings(block_q=32, block_k=32, order=(2, 4, 4))
    router = Router(PLAN, MODEL, settings, Clock(PLAN.stage))
    return SimpleNamespace(
        router=router, sites=[(router.routes[0], SimpleNamespace(layer=nn.Linear(2, 2)))], module=nn.Linear(2, 2)
    )


def test_before_any_run_and_for_a_grid(session):
    layers = make_report(PLAN, {"model": session}, None).models[0].layers
    assert [layer.state for layer in layers] == ["unknown"] * 3
    assert "report(pipe, grid=(frames, height, width))" in str(layers[0].why)
    model = make_report(PLAN, {"model": session}, (2, 8, 8)).models[0]
    assert [(x.state, x.why) for x in model.layers] == [
        ("dense", "dense layer"),
        ("sparse", None),
        ("dense", "dense pattern or step"),
    ]
    # blocks of 2 x 4 x 4 tokens, windows aligned with them: each sees 1 of 4 blocks, in it its own one of 2 frames
    assert (model.layers[1].block_density, model.layers[1].density) == (0.25, 0.125)
    assert (model.density, model.block_density, model.tokens, model.impl) == (0.125, 0.25, 128, "cpu")
    assert model.impl_reasons["triton"]
    with pytest.raises(ValueError, match="window"):
        make_report(PLAN, {"model": session}, (2, 3, 3))


def test_without_a_timestep_all_runs_dense_and_says_so(session):
    plan = replace(PLAN, dense_steps=0.5)
    session.router = Router(plan, MODEL, Settings(), Clock(plan.stage))
    session.router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    layer = make_report(plan, {"model": session}, None).models[0].layers[1]
    assert (layer.state, layer.why) == ("dense", "the step is not known")


def test_times(session):
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    near = router.routes[1].lists
    stats = [
        LayerStats(dense=4, dense_seconds=4.0),
        LayerStats(served={near: 4}, sparse_seconds=2.0),
        LayerStats(dense=4, dense_seconds=4.0),
    ]
    for route, entry in zip(router.routes, stats, strict=True):
        route.stats = entry
    router.denoiser_seconds = 14.0  # 10 in attention, 4 elsewhere; all dense it would be 12 + 4
    model = make_report(PLAN, {"model": session}, None).models[0]
    assert (model.attention_seconds, model.denoiser_seconds) == (10.0, 14.0)
    assert model.attention_share == pytest.approx(12 / 16)
    assert model.efficiency == pytest.approx(
        0.25 * 1.0 / 0.5
    )  # a sparse call takes half a dense one at a quarter of it
    assert model.speedup == pytest.approx(16 / 14)
    assert model.ceiling == pytest.approx(1 / (0.25 + 0.75 * (8 + 4 * 0.25) / 12))
    assert model.warning is None
    ahead = make_report(PLAN, {"model": session}, (2, 16, 16)).models[0]  # another grid: the run's times say nothing
    assert (ahead.ceiling, ahead.attention_seconds, ahead.layers[1].sparse_calls) == (None, None, 0)


def test_density_is_the_mean_over_the_calls_of_a_run(session):
    router = session.router
    for grid, calls in (((2, 8, 8), 3), ((1, 4, 4), 1)):  # block densities 1/4 and 1
        router.begin(Layout(grid), None, torch.device("cpu"))
        router.routes[1].stats.served[router.routes[1].lists] = calls
    router.routes[1].lists = None  # the last step was dense
    layer = make_report(PLAN, {"model": session}, None).models[0].layers[1]
    assert (layer.state, layer.sparse_calls, layer.block_density) == ("sparse", 4, (3 * 0.25 + 1) / 4)


def test_implementation_is_that_of_the_calls(session):
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    near = router.routes[1].lists
    router.routes[1].stats = LayerStats(served={near: 1}, inputs=(torch.device("cpu"), torch.float64))
    assert make_report(PLAN, {"model": session}, None).models[0].impl == "reference"  # the weights are float32


def test_counts_of_an_earlier_run_are_not_shown(session):
    """Of two denoisers, one may not be called at all in a run."""
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    router.routes[1].stats.dense = 5
    router.clock.runs += 1
    assert make_report(PLAN, {"model": session}, None).models[0].layers[1].dense_calls == 0


def test_warning_where_attention_is_small(session):
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    router.routes[0].stats = LayerStats(dense=1, dense_seconds=0.01)
    router.routes[1].stats = LayerStats(served={router.routes[1].lists: 1}, sparse_seconds=0.005)
    router.denoiser_seconds = 1.0
    text = str(make_report(PLAN, {"model": session}, None))
    assert "warning: little to gain at this size: self-attention takes 2% of a dense step" in text


def test_no_ceiling_without_a_dense_call(session):
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    router.routes[1].stats = LayerStats(served={router.routes[1].lists: 1}, sparse_seconds=0.5)
    router.denoiser_seconds = 1.0
    report = make_report(PLAN, {"model": session}, None)
    assert (report.models[0].ceiling, report.models[0].attention_seconds) == (None, 0.5)
    assert "no dense call was timed" in str(report)


def test_fallbacks_are_shown_and_json_holds_everything(session):
    router = session.router
    router.begin(Layout((2, 8, 8)), None, torch.device("cpu"))
    router.routes[1].stats = LayerStats(dense=2, fallbacks={"a mask came": 2})
    report = make_report(PLAN, {"transformer": session}, None)
    layer = report.models[0].layers[1]
    assert (layer.state, layer.why) == ("not served", "a mask came")
    assert "layer 1: 2 calls ran dense against the plan: a mask came" in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert SparsePlan.from_dict(data["plan"]) == PLAN
    model = data["models"][0]
    assert (model["component"], model["grid"], model["layers"][1]["fallbacks"]) == (
        "transformer",
        [2, 8, 8],
        {"a mask came": 2},
    )
    assert model["layers"][1]["dense_calls"] == 2


def test_pattern_of_the_report_is_the_plans():
    assert PLAN.patterns["near"].resolve((2, 8, 8)) == Neighborhood(window=(1, 4, 4), stride=(1, 4, 4))


def test_a_grid_for_a_plan_that_sees_whole_tiles(session):
    plan = replace(
        PLAN,
        patterns=PLAN.patterns | {"chosen": PatternTemplate({"name": "top_k", "share": 0.25})},
        assignment=(Rule(pattern="chosen", layers=1, heads=0), Rule(pattern="all", layers=2)),
        dense_steps=1,
        proxies={},
    )
    session.router = Router(plan, MODEL, session.router.settings, Clock(plan.stage))
    layers = make_report(plan, {"model": session}, (2, 8, 8)).models[0].layers
    assert [layer.state for layer in layers] == ["dense", "sparse", "dense"]
    tiles = tiles_for(Layout((2, 8, 8)), 32, 32, torch.device("cpu"))
    near = float(tiles.widen(Neighborhood(window=(1, 4, 4), stride=(1, 4, 4))).float().mean())
    assert 0 < near < 1
    assert layers[1].block_density == pytest.approx((near + 0.25) / 2)
