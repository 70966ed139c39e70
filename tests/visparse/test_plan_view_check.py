"""Checks of a plan: model, run, grids with their block density; the shape of a model from its configs alone."""

import json
from dataclasses import replace

import pytest
import torch

from visparse.compensation.tiles import tiles_for
from visparse.estimates import estimate
from visparse.layout import Layout
from visparse.patterns import Neighborhood, PerHead, Skip, TopK, TopP
from visparse.plan import SparsePlan
from visparse.plan_view_check import block_densities, check_plan, names_used
from visparse.plan_view_model import model_shapes
from visparse.presets import load_plan
from visparse.rules import ModelFingerprint

GRID = (4, 16, 24)
SHAPE = ModelFingerprint(model_class="Wan", layers=2, heads=2, head_dim=64)
NEAR = Neighborhood(window=(3, 5, 5))
PLAN = SparsePlan(
    name="mine",
    patterns={"near": NEAR, "off": Skip(), "dense": {"name": "dense"}},
    default="near",
    assignment=[{"pattern": "off", "layers": 0, "heads": 0}],
    dense_layers=[1],
    dense_steps=2,
    model=SHAPE,
)


def test_all_is_well():
    model, run, grid = check_plan(PLAN, [SHAPE], [GRID], 8)
    assert str(model) == "ok     model: Wan, 2 layers of 2 heads of 64"
    assert str(run) == "ok     run of 8 steps: 6 sparse steps, the first is 2"
    near = estimate(NEAR, Layout(GRID)).block_density
    assert 0 < near < 1
    assert grid.densities == {"off": (0.0, 0.0), "near": (near, near)}
    mean = (0 + near + 2) / 4
    text = f"block density off 0.0%; near {near:.1%}; mean over all heads at the last steps {mean:.1%}"
    assert str(grid) == f"ok     grid 4x16x24: {text}"
    assert grid.to_dict()["block_density"]["near"] == [near, near]


def test_what_is_wrong_is_told_apart():
    other = replace(SHAPE, layers=3)
    plan = replace(PLAN, made_for=(4, 16, 24), grids=((4, 16, 24), (1, 1, 1)))
    model, run, fits, tiny, off = check_plan(plan, [other], [GRID, (1, 1, 1), (4, 8, 8)], 2)
    assert (model.ok, run.ok, fits.ok, off.ok) == (False, False, True, False)
    assert model.text.startswith("the plan was made for another model: layers 2, this model has 3")
    assert run.text.startswith("all 2 steps are dense by the plan's schedule (first 2 steps)")
    assert off.text == (
        "not one of the plan's grids (4x16x24, 1x1x1), so all would run dense; add it to the plan's grids"
    )
    assert tiny.ok  # the window is rescaled to a single token


def test_a_pattern_that_does_not_fit_is_named():
    (_, grid) = check_plan(replace(PLAN, model=None), [], [(2, 16, 24)], 8)
    assert not grid.ok
    assert grid.text.startswith("pattern 'near': window: 3 with dilation 1 needs 3 tokens on the frames axis")


def test_schedules():
    plan = replace(PLAN, patterns={**PLAN.patterns, "near": TopK()}, dense_steps={"first": 1, "last": 1})
    assert check_plan(plan, [], [], 9)[0].text == "7 sparse steps, the first is 1"
    followed = replace(plan, patterns={"top": TopK(refresh={"overlap_below": 0.6})}, default="top", assignment=())
    assert check_plan(followed, [], [], 9)[0].text.endswith(
        "; 5 of them, from 2 on, may be measured again, where the overlap has fallen below 0.6"
    )
    noise = replace(PLAN, dense_steps={"sigma_above": 0.5})
    run, grid = check_plan(noise, [], [GRID], 9)
    assert (run.ok, run.text) == (
        True,
        "not checked: the schedule goes by noise level, which only a scheduler knows",
    )
    assert grid.ok


def test_densities_of_selectors_and_lists():
    mix = PerHead(patterns=(Skip(), NEAR))
    patterns = {"k": TopK(share=0.25), "p": TopP(least=0.1, most=0.5), "mix": mix, "dense": {"name": "dense"}}
    plan = SparsePlan(
        name="s",
        patterns=patterns,
        default="k",
        assignment=[{"pattern": "p", "heads": 0}, {"pattern": "mix", "layers": 1}, {"pattern": "dense", "layers": 2}],
        dense_steps=1,
        residual={},
    )
    assert names_used(plan) == ["k", "p", "mix[0]", "mix[1]"]
    assert names_used(plan, replace(SHAPE, layers=3)) == ["p", "k", "mix[0]", "mix[1]"]
    near = estimate(NEAR, Layout(GRID)).block_density
    assert block_densities(plan, names_used(plan), GRID) == {
        "k": (0.25, 0.25),
        "p": (0.1, 0.5),
        "mix[0]": (0.0, 0.0),
        "mix[1]": (near, near),
    }
    assert "p 10.0% to 50.0%" in check_plan(plan, [], [GRID], 5)[1].text


def test_proxies_widen_patterns_to_tiles():
    plan = SparsePlan(name="t", patterns={"near": NEAR, "off": Skip()}, default="near", proxies={})
    exact = block_densities(replace(plan, proxies=None), ["near", "off"], GRID)
    tiled = block_densities(plan, ["near", "off"], GRID)
    assert tiled["off"] == (0.0, 0.0)
    tiles = tiles_for(Layout(GRID), 192, 128, torch.device("cpu"))
    wanted = sum(map(sum, tiles.widen(NEAR).tolist())) / (tiles.n_q * tiles.n_k)
    assert tiled["near"] == pytest.approx((wanted, wanted))
    assert 0 < wanted < 1
    assert tiled["near"] != exact["near"]


def test_a_plan_without_sparse_heads():
    assert check_plan(load_plan("dense"), [], [GRID], 5)[1].text == "all heads are dense"


@pytest.fixture
def folder(tmp_path):
    """A pipeline's configuration files; there are no weights."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 1, 1],
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 5,
    }
    for part in ("transformer", "transformer_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        config["num_layers"] = 4
    write_index(
        tmp_path, transformer="WanTransformer3DModel", transformer_2="WanTransformer3DModel", vae="AutoencoderKLWan"
    )
    return tmp_path


def write_index(folder, **parts):
    index = {"_class_name": "WanPipeline", **{part: ["diffusers", cls] for part, cls in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_shapes_from_configs(folder):
    shape = ModelFingerprint(model_class="WanTransformer3DModel", layers=5, heads=3, head_dim=16)
    assert model_shapes(folder) == {"transformer": shape, "transformer_2": replace(shape, layers=4)}


def test_what_is_no_model(folder, tmp_path):
    write_index(folder, vae="AutoencoderKLWan", unet="UNet2DModel")
    with pytest.raises(ValueError, match=r"no denoiser that visparse knows; found vae: AutoencoderKLWan, unet: UNet2"):
        model_shapes(folder)
    with pytest.raises(ValueError, match=r"transformer has no model_index.json; give the folder that save_pretrained"):
        model_shapes(folder / "transformer")
    for name in (tmp_path / "none", "./none", "none"):
        with pytest.raises(
            ValueError, match="wanted a folder or a hub id such as 'owner/name', and there is no folder"
        ):
            model_shapes(name)
