"""The plan that ships beside the trained model: `plan="auto"` takes it, and it runs as it says."""

import json

import torch

import visparse
from visparse.cli import main
from visparse.measure.generate import load_pipeline
from visparse.plan import FILE_NAME
from visparse.presets import auto_plan
from visparse_pipelines import tiny_video_path

STEPS = 12


def test_auto_takes_it_and_measures_twice() -> None:
    pipe, _ = load_pipeline(tiny_video_path(), device="cpu")
    plan = auto_plan(pipe)
    assert plan.name == "searched"
    assert "found by gallery/search/compare.py" in json.loads((tiny_video_path() / FILE_NAME).read_text())["notes"]
    with visparse.sparsify(pipe, "auto") as handle:
        made = pipe(
            "a bonsai, the camera pans left",
            num_frames=5,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
        ).frames
        layers = handle.report().to_dict()["models"][0]["layers"]
    assert torch.isfinite(torch.as_tensor(made)).all()
    # three dense steps, the last of them measured; measured again where the second range begins
    assert {(one["sparse_calls"], one["dense_calls"], one["measured_calls"]) for one in layers} == {(8, 4, 2)}
    assert all(not layer["fallbacks"] for layer in layers)


def test_it_fits_the_model(capsys) -> None:
    assert main(["plan", "check", str(tiny_video_path()), "--model", str(tiny_video_path())]) == 0
    assert "searched" in capsys.readouterr().out
