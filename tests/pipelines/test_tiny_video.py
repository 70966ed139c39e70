"""The trained pipeline that ships: stock classes, plain loading, and the front door's promises on trained weights."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from diffusers import WanPipeline

import visparse
from visparse_pipelines import tiny_video_path

SMALL = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
NEAR = {"plan": "neighborhood", "window": [1, 8, 8], "stride": 1, "dense_steps": 0}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(tiny_video_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def video(pipe: WanPipeline) -> Callable[..., torch.Tensor]:
    def make(prompt: object = "an airplane, the camera pans left", **changes: object) -> torch.Tensor:
        settings = {**SMALL, **changes, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}
        return pipe(prompt, **settings).frames

    return make


def test_loads_without_visparse() -> None:
    code = (
        "import sys; from diffusers import WanPipeline; "
        f"pipe = WanPipeline.from_pretrained({str(tiny_video_path())!r}); "
        "print(type(pipe).__name__, not any(name.startswith('visparse') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "WanPipeline True", done.stderr[-2000:]


def test_is_small_and_has_its_papers() -> None:
    files = [path for path in tiny_video_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {"README.md", "CREDITS.txt", "visparse_demo.json"} <= {path.name for path in files}


def test_attention_dominates_at_the_default_size(pipe: WanPipeline) -> None:
    demo = json.loads((tiny_video_path() / "visparse_demo.json").read_text())
    config = pipe.transformer.config
    frames = 1 + (demo["num_frames"] - 1) // pipe.vae_scale_factor_temporal
    tokens = (
        frames * (demo["height"] // pipe.vae_scale_factor_spatial) * (demo["width"] // pipe.vae_scale_factor_spatial)
    )
    assert config.attention_head_dim == 64
    assert frames >= 5
    assert tokens >= 4000


def test_says_different_things_for_different_prompts(video: Callable[..., torch.Tensor]) -> None:
    plane, pizza = video(), video("a pizza, the camera pans left")
    assert torch.isfinite(plane).all()
    assert (plane - pizza).abs().mean() > 0.05


def test_dense_is_bitwise_sparse_is_not_and_restore_is_exact(
    pipe: WanPipeline, video: Callable[..., torch.Tensor]
) -> None:
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    untouched = video()
    with visparse.sparsify(pipe, "dense"):
        assert torch.equal(video(), untouched)
    with visparse.sparsify(pipe, **NEAR) as handle:
        assert not torch.equal(video(), untouched)
        layers = handle.report().to_dict()["models"][0]["layers"]
    assert all(layer["sparse_calls"] == 2 and layer["block_density"] < 1 for layer in layers)
    assert all(block.attn1.processor is old for block, old in zip(pipe.transformer.blocks, before, strict=True))
    assert torch.equal(video(), untouched)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": 7, "height": 48, "width": 80},
        {"num_frames": 13, "height": 80, "width": 48},
        {"guidance_scale": 3.0},
        {"num_frames": 1},
    ],
    ids=["odd", "prime frames", "guidance", "one frame"],
)
def test_any_size_and_guidance(pipe: WanPipeline, video: Callable[..., torch.Tensor], changes: dict) -> None:
    whole = {"plan": "neighborhood", "window": ["100%", "100%", "100%"], "stride": 1, "dense_steps": 0}
    untouched = video(**changes)
    with visparse.sparsify(pipe, **whole):
        torch.testing.assert_close(video(**changes), untouched, atol=2e-3, rtol=0)
    with visparse.sparsify(pipe, **NEAR):
        assert not torch.equal(video(**changes), untouched)


def test_batch_of_two(pipe: WanPipeline, video: Callable[..., torch.Tensor]) -> None:
    prompts = ["a watch, the camera zooms in", "a pizza, the camera zooms in"]
    with visparse.sparsify(pipe, **NEAR):
        both = video(prompts)
        assert both.shape[0] == 2
        assert torch.isfinite(both).all()
        assert not torch.equal(both[0], both[1])
