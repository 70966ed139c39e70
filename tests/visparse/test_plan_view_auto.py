"""plan="auto": the file beside the model, matched by its shape, else the safest preset with a reason."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

import visparse
from visparse.plan import FILE_NAME, SparsePlan
from visparse.presets import SAFEST, auto_plan, load_plan

SHAPE = {"model_class": "WanTransformer3DModel", "layers": 2, "heads": 2, "head_dim": 16}


def make(**changes):
    values = {"name": "mine", "patterns": {"near": {"name": "window", "window": [1, 3, 3]}}, "default": "near"}
    return SparsePlan(**{**values, "model": None, **changes})


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with a denoiser in it, as save_pretrained leaves them; no weights are needed."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


@pytest.fixture
def pipe(folder):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
        )
    transformer.register_to_config(_name_or_path=str(folder / "transformer"))
    return SimpleNamespace(
        components={"transformer": transformer}, config=SimpleNamespace(_name_or_path=str(folder)), scheduler=None
    )


def save(plan, folder, **changes):
    data = {**plan.to_dict(), **changes}
    (folder / FILE_NAME).write_text(json.dumps(data))


def test_the_file_beside_the_model(pipe, folder):
    save(make(), folder, model=SHAPE)
    for target in (pipe, pipe.components["transformer"]):
        plan = load_plan("auto", target)
        assert (plan.name, plan.notes) == ("mine", f"chosen by 'auto': {folder / FILE_NAME}")
        assert vars(plan.model) == SHAPE


def test_a_denoiser_of_another_folder_brings_its_own_plan(pipe, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save(make(), folder)
    save(make(name="other"), other)
    pipe.components["transformer"].register_to_config(_name_or_path=str(other))
    assert auto_plan(pipe).name == "other"
    (other / FILE_NAME).unlink()
    assert auto_plan(pipe).name == "mine"


def test_a_folder_above_that_is_no_pipeline_does_not_count(pipe, folder):
    save(make(), folder)
    (folder / "model_index.json").unlink()
    assert auto_plan(pipe.components["transformer"]).name == SAFEST
    assert auto_plan(pipe).name == "mine"


def test_unknown_models_get_the_safest_preset_and_are_told_how_to_search(pipe):
    plan = auto_plan(pipe)
    assert plan.patterns == load_plan("radial").patterns
    assert plan.notes.endswith(
        f"chosen by 'auto' as the safest preset: no {FILE_NAME} beside the model; search for one with "
        f"`visparse search --model FOLDER_OR_ID --out {FILE_NAME}` and keep it in the model's folder"
    )
    pipe.config._name_or_path = pipe.components["transformer"].config._name_or_path
    del pipe.config
    pipe.components["transformer"].register_to_config(_name_or_path="owner/on-the-hub")
    assert auto_plan(pipe) == plan


def test_a_plan_for_another_shape_is_left_with_a_warning(pipe, folder):
    save(make(), folder, model={**SHAPE, "layers": 8})
    wanted = "does not fit: the plan was made for another model: layers 8, this model has 2"
    with pytest.warns(UserWarning, match=rf"plan 'auto' runs 'radial', since .*{FILE_NAME} {wanted}"):
        plan = auto_plan(pipe)
    assert plan.name == SAFEST
    assert wanted in plan.describe()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema": 1, "name"', "is not a complete JSON file: Expecting ':' delimiter"),
        ('{"schema": 2}', "schema must be 1, got 2"),
    ],
)
def test_a_damaged_file_is_an_error(pipe, folder, text, reason):
    (folder / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="mend it or take it away, or name a preset") as caught:
        auto_plan(pipe)
    assert str(caught.value).startswith(f"{folder / FILE_NAME}: {reason}")
    assert str(caught.value).count(FILE_NAME) == 1


def test_without_a_model():
    with pytest.raises(ValueError, match=r"'auto' means the plan of a model, and here is none; .* \(dense, foveal"):
        load_plan("auto")
    with pytest.raises(ValueError, match="unknown plan 'atuo'; did you mean 'auto'"):
        load_plan("atuo")
    with pytest.raises(TypeError, match="wanted a diffusers pipeline or a denoiser"):
        load_plan("auto", 3)


def test_sparsify_takes_it(pipe, folder):
    save(make(), folder)
    transformer = pipe.components["transformer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with visparse.sparsify(transformer, "auto", dense_steps=1) as handle:
            assert handle.plan.dense_steps == 1
            text = str(handle.report())
    assert "plan 'mine'" in text
    assert "chosen by 'auto'" in text
