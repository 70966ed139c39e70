"""A search calibrated on pictures: a vision transformer of timm with random weights."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

import visparse
from visparse.cli import main
from visparse.head_search.images import find_pictures, runs_of
from visparse.plan import SparsePlan
from visparse.session import session_of
from visparse.timm_models import make_timm

SIDE = 192  # pixels: 12 x 12 patches of 16
SHAPE = {"img_size": SIDE, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
FAST = {"rows": 2, "probe": False, "rates": "h200"}


def make(**more):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SHAPE | more)).eval().requires_grad_(False)


@pytest.fixture
def vit():
    return make()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for name, size in (("b.png", (300, 200)), ("a.JPG", (200, 320)), ("c.webp", (250, 250))):
        coarse = torch.randint(256, (6, 6, 3), generator=random, dtype=torch.uint8)
        picture = Image.frombytes("RGB", (6, 6), coarse.numpy().tobytes()).resize(size)
        picture.save(folder / name, format={"b.png": "PNG", "a.JPG": "JPEG", "c.webp": "WEBP"}[name])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_become_inputs_as_timm_prepares_them(vit, photos):
    files = find_pictures(photos)
    assert [path.name for path in files] == ["a.JPG", "b.png", "c.webp"]
    runs = runs_of(vit, str(photos))
    assert [run[0]["x"].shape for run in runs] == [(1, 3, SIDE, SIDE)] * 3
    config = timm.data.resolve_model_data_config(vit) | {"input_size": (3, SIDE, SIDE)}
    with Image.open(files[1]) as picture:
        opened = picture.convert("RGB")
    wanted = timm.data.create_transform(**config)(opened)
    assert torch.equal(runs[1][0]["x"][0], wanted)
    assert torch.equal(runs_of(vit, [opened])[0][0]["x"], wanted[None])
    assert runs_of(vit, [files[0]], (64, 96))[0][0]["x"].shape == (1, 3, 64, 96)
    batch = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(runs_of(vit, batch)[0][0]["x"], batch)
    assert [run[0]["x"].shape[0] for run in runs_of(vit, [batch, batch[0]])] == [2, 1]
    assert runs_of(vit.half(), [opened])[0][0]["x"].dtype == torch.float16


def test_pictures_that_are_none(vit, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images: no folder .*nowhere; wanted one with pictures \(\.jpg"):
        runs_of(vit, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture; wanted files that end in"):
        runs_of(vit, str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="wanted at least one picture, got none"):
        runs_of(vit, [])
    with pytest.raises(ValueError, match=r"got uint8 \[3, 192, 192\] in place 0; give a PIL picture"):
        runs_of(vit, [torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)])
    with pytest.raises(TypeError, match="wanted tensors, PIL pictures or paths, got int in place 1"):
        runs_of(vit, [torch.zeros(3, SIDE, SIDE), 3])
    with pytest.raises(ValueError, match=r"notes.txt cannot be read as a picture"):
        runs_of(vit, [photos / "notes.txt"])
    with pytest.raises(FileNotFoundError, match=r"images: no file .*gone.png"):
        runs_of(vit, [photos / "gone.png"])
    with pytest.raises(ValueError, match="wanted pictures of one size, got 96 x 96, 192 x 192; a plan"):
        runs_of(vit, [torch.zeros(3, SIDE, SIDE), torch.zeros(3, 96, 96)])
    with pytest.raises(ValueError, match="wanted a vision transformer of timm, got Linear; a pipeline gets prompts"):
        visparse.search(nn.Linear(2, 2), images=[torch.zeros(3, 8, 8)], attention=0.5)
    for wrong in ({"images": [torch.zeros(3, SIDE, SIDE)], "prompts": ["a cat"]}, {"size": (SIDE, SIDE)}):
        with pytest.raises(ValueError, match="images: wanted them in place of prompts and inputs, and size only with"):
            visparse.search(vit, attention=0.5, **wrong)


def test_search_finds_plans_that_run(vit, photos, tmp_path):
    plan = visparse.search(vit, images=photos, density=0.7, work=tmp_path / "work.jsonl", **FAST)
    assert session_of(vit) is None
    assert (plan.model.model_class, plan.model.layers, plan.model.heads) == ("VisionTransformer", 2, 2)
    assert (plan.made_for, plan.dense_steps) == ((1, 12, 12), 0)
    assert plan.measured["calibration"]["runs"] == 3
    assert plan.measured["predicted"]["block_density"] <= 0.7
    x = runs_of(vit, photos)[0][0]["x"]
    dense = vit.forward_features(x)
    with visparse.sparsify(vit, plan, strict=True) as handle:
        sparse = vit.forward_features(x)
        assert {layer.state for layer in handle.report().models[0].layers} <= {"sparse", "dense"}
    assert 0 < float((sparse - dense).norm() / dense.norm()) < 0.9
    work = [json.loads(line) for line in (tmp_path / "work.jsonl").read_text().splitlines()]
    assert sum("key" in line for line in work) == 3 * 2  # pictures, layers


def test_a_generous_search_is_nearly_dense(vit, photos):
    plan = visparse.search(vit, images=photos, max_error=1e-6, family="plain", **FAST)
    x = runs_of(vit, photos)[2][0]["x"]
    dense = vit(x)
    with visparse.sparsify(vit, plan):
        torch.testing.assert_close(vit(x), dense, atol=1e-4, rtol=1e-4)


def command(model, photos, out, *more):
    given = ["search", "--model", model, "--out", str(out), "--device", "cpu", "--rows", "2", "--rates", "h200"]
    return main([*given, *(["--images", str(photos)] if photos else []), *more])


def test_the_command_on_a_folder_of_timm(vit, photos, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "plan.json"
    save_for_hf(vit, folder, model_args=SHAPE, safe_serialization=True)
    model = f"timm:{folder}"
    assert command(model, photos, out, "--density", "0.7") == 0
    assert f"written to {out}" in capsys.readouterr().out
    plan = SparsePlan.from_pretrained(out)
    assert plan.made_for == (1, 12, 12)
    loaded = make_timm(model)
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert not loaded.training
    with visparse.sparsify(loaded, str(out), strict=True):
        loaded(runs_of(loaded, photos)[0][0]["x"])
    assert main(["plan", "show", str(out)]) == 0
    assert main(["plan", "check", str(out), "--model", model, "--steps", "1"]) == 0
    assert "VisionTransformer" in capsys.readouterr().out
    assert main(["plan", "check", str(out), "--model", "timm:vit_tiny_patch16_224"]) == 1
    assert "layers 2, this model has 12" in capsys.readouterr().err
    assert command(model, photos, out, "--density", "0.7", "--dry-run") == 0
    assert "grid 1x12x12 + 1 = 145 tokens, 1 steps" in capsys.readouterr().out
    assert command(f"timm:{photos}", photos, out, "--density", "0.7") == 1
    assert "photos has no config.json; give a folder that timm.models.save_for_hf wrote" in capsys.readouterr().err


def test_the_command_on_a_checkpoint(photos, tmp_path, capsys):
    torch.manual_seed(1)
    file = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit").state_dict(), file)
    out = tmp_path / "plan.json"
    size = ["--height", "96", "--width", "128"]
    given = ["--checkpoint", str(file), "--attention", "0.99", *size]
    assert command("timm:test_vit", photos, out, *given, "--dry-run") == 0
    assert "grid 1x6x8 + 1 = 49 tokens" in capsys.readouterr().out
    assert command("timm:test_vit", photos, out, "--checkpoint", "gone.pt", "--attention", "0.5") == 1
    assert "checkpoint: no file gone.pt" in capsys.readouterr().err
    assert command("timm:tset_vit", photos, out, "--attention", "0.5") == 1
    assert "'tset_vit' is neither a folder nor a model of timm; did you mean 'test_vit'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "more", "text"),
    [
        ("timm:test_vit", ["--prompts", "p.txt"], "--prompts: timm:test_vit is a vision transformer, which has none"),
        ("timm:test_vit", ["--steps", "3"], "--steps: timm:test_vit is a vision transformer, which has none"),
        ("timm:test_vit", ["--images", "", "--height", "32"], "pictures need --height and --width, or neither"),
        ("timm:test_vit", [], "--images: a vision transformer needs a folder of pictures"),
        ("folder", ["--images", "x"], "--images: folder is a pipeline, which has none; leave it out"),
        ("folder", ["--checkpoint", "x"], "--checkpoint: folder is a pipeline"),
    ],
)
def test_options_of_the_other_kind(model, more, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(model, None, Path(tmp_path) / "plan.json", "--attention", "0.5", *more)
    assert text in capsys.readouterr().err


def test_refining_judges_what_the_head_returns(vit):
    images = list(torch.randn(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    for block in vit.blocks:  # else attention is uniform
        block.attn.qkv.weight.data.normal_(std=0.3)
    plan = visparse.search(vit, images=images, attention=0.9, refine=5, weigh=2, **FAST)
    assert session_of(vit) is None
    judged = plan.measured["output_errors"]
    assert judged[plan.measured["taken"]] == min(judged.values())
    assert any("by weight" in name for name in judged)
    assert min(plan.measured["weights"][0]) > 0
    dense = [vit(image) for image in images]
    with visparse.sparsify(vit, plan):
        made = [vit(image) for image in images]
    errors = [float((a - b).square().mean().sqrt()) for a, b in zip(made, dense, strict=True)]
    last = plan.measured["climb"]["output_error"]
    assert last == pytest.approx(sum(errors) / 2, rel=1e-4, abs=1e-6)
    assert last > 0

    class Half(nn.Module):
        def forward(self, x):
            return x[:, :1] * 1000

    vit.head = Half()
    other = visparse.search(vit, images=images, attention=0.9, refine=2, **FAST).measured["output_errors"]
    assert min(other.values()) > 2 * max(judged.values())
