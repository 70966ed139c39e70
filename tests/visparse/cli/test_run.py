from types import SimpleNamespace

import pytest
import torch

import visparse
from visparse.measure.generate import Generation, Request, default_arguments, find_denoisers, generate, load_pipeline
from visparse.measure.settings import PlanChoice, RunSettings
from visparse.run import compare, equal_time_steps

SIZE = {"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 1.0}
NEAR = PlanChoice(plan="neighborhood", label="near", overrides={"window": [1, 3, 3], "stride": 1, "dense_steps": 1})


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load_pipeline(tiny_folder, device="cpu")[0]


@pytest.fixture(scope="module")
def found(tiny_folder):
    settings = RunSettings(
        model=str(tiny_folder), prompt="a cat", num_inference_steps=3, seed=7, plans=(NEAR,), device="cpu", **SIZE
    )
    return compare(settings)


def test_generation_repeats_bitwise_and_follows_the_seed(pipe):
    one, again = [generate(pipe, Request(prompt="a cat", seed=1, **SIZE), steps=2) for _ in range(2)]
    other = generate(pipe, Request(prompt="a cat", seed=2, **SIZE), steps=2)
    assert one.frames.shape == (5, 32, 48, 3)
    assert one.frames.dtype == torch.uint8
    assert torch.equal(one.latents, again.latents)
    assert torch.equal(one.frames, again.frames)
    assert not torch.equal(one.latents, other.latents)


def test_generation_is_what_the_pipeline_makes(pipe):
    made = generate(pipe, Request(prompt="a cat", seed=1, **SIZE), steps=2)
    generator = torch.Generator("cpu").manual_seed(1)
    plain = pipe("a cat", num_inference_steps=2, generator=generator, output_type="np", **SIZE).frames[0]
    assert torch.equal(made.frames, torch.as_tensor(plain).mul(255).round().to(torch.uint8))


def test_parts_of_the_time_add_up(pipe):
    ticks = []
    made = generate(
        pipe, Request(prompt="a cat", **{**SIZE, "guidance_scale": 4.0}), steps=3, tick=lambda: ticks.append(1)
    )
    assert (made.steps, len(ticks)) == (3, 3)
    parts = made.seconds_text + made.seconds_denoise + made.seconds_decode
    assert parts == pytest.approx(made.seconds)
    assert made.seconds_per_step == pytest.approx(made.seconds_denoise / 3)


def test_rows_of_a_comparison(found):
    rows = {row["label"]: row for row in found.record.rows}
    assert [row["plan"] for row in found.record.rows][:2] == ["dense", "neighborhood"]
    assert set(found.films) == set(rows)
    dense, near, floor = rows["dense"], rows["near"], rows["dense again (floor)"]
    assert dense["tokens"] == 48
    assert (dense["heads"], dense["head_dim"], dense["dense_steps"], dense["block_density"]) == (2, 16, 3, 1.0)
    assert near["grid"] == [2, 4, 6]
    assert (near["impl"], near["dense_steps"]) == ("cpu", 1)
    assert near["density"] == pytest.approx(9 / 48, abs=1e-6)
    assert near["run_block_density"] == pytest.approx((1 + 2 * near["block_density"]) / 3)
    assert near["latent_error"] > 100 * floor["latent_error"] > 0
    assert near["psnr"] < 100
    assert not near["identical"]
    assert near["psnr_min"] == min(near["psnr_frames"])
    assert near["speedup"] == pytest.approx(dense["seconds"] / near["seconds"])
    assert near["ceiling"] >= 1
    assert floor["latent_error"] < 1e-5


def test_settings_of_a_comparison_say_everything(found):
    settings = found.record.settings
    assert settings["model"] == "tiny_random"
    assert (settings["num_frames"], settings["height"], settings["width"]) == (5, 32, 48)
    assert settings["plans"][0]["overrides"] == {"window": [1, 3, 3], "stride": 1, "dense_steps": 1}
    assert 0 < settings["attention_share_of_step"] < 1


def test_only_dense_and_the_median_of_repeats(tiny_folder):
    settings = RunSettings(
        model=str(tiny_folder), prompt="p", num_inference_steps=1, plans=(), compare=("dense",), repeats=3, **SIZE
    )
    found = compare(settings)
    assert [row["plan"] for row in found.record.rows] == ["dense"]
    assert found.record.rows[0]["repeats"] == 3
    assert "psnr" not in found.record.rows[0]


def test_dense_plan_is_bitwise_and_measured(pipe):
    request = Request(prompt="a cat", seed=3, **SIZE)
    plain = generate(pipe, request, steps=2)
    with visparse.sparsify(pipe, "dense"):
        wrapped = generate(pipe, request, steps=2)
    assert torch.equal(plain.latents, wrapped.latents)


def test_wrong_plans_fail_before_anything_is_generated(tiny_folder, monkeypatch):
    monkeypatch.setattr("visparse.run.generate", lambda *_, **__: pytest.fail("generated before the plans were tried"))
    settings = RunSettings(model=str(tiny_folder), prompt="p", plans=(PlanChoice(plan="radiall"),), **SIZE)
    with pytest.raises(ValueError, match="radial"):
        compare(settings)


def test_equal_time_by_hand():
    empty = torch.zeros(1)
    dense = Generation(
        frames=empty, latents=empty, steps=10, seconds=12.0, seconds_text=0.5, seconds_denoise=10.0, seconds_decode=1.5
    )
    assert equal_time_steps(7.5, dense) == 5
    assert equal_time_steps(7.0, dense) == 5
    assert equal_time_steps(1.0, dense) == 1
    assert equal_time_steps(12.0, dense) == 10


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no/such/folder", "model: wanted a folder or a hub id such as 'owner/name', and there is no folder"),
        ("./missing", "there is no folder './missing'"),
        ("missing", "there is no folder 'missing'"),
    ],
)
def test_missing_folder_is_named(name, text):
    with pytest.raises(ValueError, match=text):
        load_pipeline(name, device="cpu")


def test_wrong_loading_arguments_are_named(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match=r"has no model_index\.json; give the folder that save_pretrained wrote"):
        load_pipeline(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="dtype: wanted auto, float32, bfloat16, float16, got 'int8'"):
        load_pipeline(tiny_folder, device="cpu", dtype="int8")
    with pytest.raises(ValueError, match="device: wanted auto, cpu or cuda, got 'tpu'"):
        load_pipeline(tiny_folder, device="tpu")


def test_pipelines_that_cannot_be_measured_are_named(pipe):
    class Labels:
        def __call__(self, class_labels):
            return None

    with pytest.raises(ValueError, match="Labels takes no 'prompt'"):
        generate(Labels(), Request(prompt="p"), steps=1)
    with pytest.raises(ValueError, match="has no transformer and no unet"):
        find_denoisers(SimpleNamespace())
    with pytest.raises(ValueError, match="num_frames: wanted at least 1, got 0"):
        Request(prompt="p", num_frames=0)
    assert default_arguments(pipe)["num_inference_steps"] == 50


def test_frames_with_nan_are_an_error(pipe, monkeypatch):
    monkeypatch.setattr(pipe.video_processor, "postprocess_video", lambda video, output_type: video.mul(float("nan")))
    with pytest.raises(RuntimeError, match="frames with NaN or infinity"):
        generate(pipe, Request(prompt="a cat", **SIZE), steps=1)


@pytest.mark.gpu
def test_comparison_on_cuda(tiny_folder):
    settings = RunSettings(
        model=str(tiny_folder), prompt="p", num_inference_steps=3, plans=(NEAR,), device="cuda", dtype="float32", **SIZE
    )
    found = compare(settings)
    assert found.record.device["type"] == "cuda"
    assert {row["plan"] for row in found.record.rows} >= {"dense", "neighborhood", "floor"}
