"""Runs of pipelines that stop, change or go side by side: nothing that is stale or of another run is ever used."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanPipeline
from diffusers.models.embeddings import get_3d_rotary_pos_embed

import visparse


def stop(pipe: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_run_after_one_that_was_stopped_is_as_a_first_one(wan, movie, fresh, plan, step, sparse, serving, at_step):
    sparse(wan, plan)
    with pytest.raises(KeyboardInterrupt):
        movie(wan, guidance=3.0, height=64, callback_on_step_end=at_step(step, stop))
    with pytest.raises(KeyboardInterrupt):
        movie(wan, callback_on_step_end=at_step(step, stop))
    assert torch.equal(movie(wan), fresh(plan))
    movie(wan, callback_on_step_end=at_step(step, lambda pipe: setattr(pipe, "_interrupt", True)))
    assert not serving(wan).states
    assert torch.equal(movie(wan), fresh(plan))


def test_sizes_batches_and_guidance_change_between_runs(wan, movie, fresh, plan, reuses, sparse):
    sparse(wan, plan)
    runs: list[dict[str, Any]] = [
        {},
        {"height": 64, "num_frames": 17},
        {"num_videos_per_prompt": 2},
        {"guidance": 3.0},
        {"batch": 2, "guidance": 3.0},
        {"num_inference_steps": 9},
        {},
    ]
    for settings in runs:
        assert torch.equal(movie(wan, **settings), fresh(plan, **settings)), settings
    assert reuses


def cogvideox() -> Any:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    ).eval()


def test_one_call_for_both_branches_is_two_calls(reuses, sparse, layers):
    """A bare transformer, called by hand with falling timesteps: guidance in one batch of two, and in two passes."""

    def denoise(model: Any, rows: list[slice]) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        latents, text = torch.randn(2, 3, 4, 16, 16, generator=random), torch.randn(2, 6, 16, generator=random)
        rotary = get_3d_rotary_pos_embed(32, ((0, 0), (8, 8)), (8, 8), 3)
        outs = []
        with torch.no_grad():
            for t in (900, 800, 600, 400, 200):
                parts = [
                    model(latents[row], text[row], torch.tensor([t]).expand(len(text[row])), image_rotary_emb=rotary)
                    for row in rows
                ]
                outs.append(torch.cat([part.sample for part in parts]))
                latents = latents - 0.2 * outs[-1]
        return torch.stack(outs)

    results = []
    for rows in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = cogvideox()
        dense = denoise(model, rows)
        sparse(model, dense_steps=1, refresh=2, residual={"refresh": 2, "storage": "full"})
        results.append(denoise(model, rows))
        torch.testing.assert_close(results[-1][[0, 2, 4]][0], dense[0], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(results[-1][1], dense[1], atol=1e-4)
        counts = [(x.sparse_calls, x.measured_calls) for x in layers(model)]
        assert counts == [(2 * len(rows), 3 * len(rows))] * 2
        assert torch.equal(denoise(model, rows), results[-1])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def test_two_pipelines_in_step_do_not_mix(make_wan, movie, fresh, plan, sparse):
    pipes, results = [make_wan(), make_wan()], {}
    settings: list[dict[str, Any]] = [{"guidance": 3.0}, {"height": 64}]
    barrier = threading.Barrier(2, timeout=60)

    def in_step(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        barrier.wait()
        return {}

    def run(place: int) -> None:
        sparse(pipes[place], plan)
        results[place] = movie(pipes[place], callback_on_step_end=in_step, **settings[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        assert torch.equal(results[place], fresh(plan, **settings[place]))


def test_two_pipelines_around_one_transformer_run_in_turn(wan, movie, fresh, sparse, at_step):
    twin = WanPipeline(**wan.components)
    twin.set_progress_bar_config(disable=True)
    sparse(wan)
    wanted = fresh()
    with pytest.raises(KeyboardInterrupt):
        movie(wan, callback_on_step_end=at_step(2, stop))
    assert torch.equal(movie(twin), wanted)
    assert torch.equal(movie(wan), wanted)


def offload_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading by its hooks")
    accelerate.dispatch_model(pipe.transformer, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offload_groups(pipe: Any) -> None:
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_model, offload_layers, offload_groups])
@pytest.mark.parametrize("first", [True, False])
def test_hooks_that_offload_change_nothing(wan, movie, fresh, offload, first, sparse):
    if first:
        offload(wan)
    sparse(wan)
    if not first:
        offload(wan)
    wanted = fresh()
    assert torch.equal(movie(wan), wanted)
    assert torch.equal(movie(wan), wanted)


def test_another_dtype_between_runs(wan, movie, sparse):
    sparse(wan)
    full = movie(wan)
    wan.to(torch.bfloat16)
    half = movie(wan)
    assert half.isfinite().all()
    assert torch.equal(movie(wan), half)
    visparse.restore(wan)
    sparse(wan)
    assert torch.equal(movie(wan), half)
    assert not torch.equal(full, half.float())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_in_the_middle_of_a_run_begin_without_states(wan, make_wan, movie, fresh, way, sparse, serving, at_step):
    sparse(wan)
    twins: list[Any] = []
    result = movie(wan, callback_on_step_end=at_step(2, lambda pipe: twins.append(way(pipe.transformer))))
    other = make_wan(transformer=twins[0])
    assert not serving(other).states
    wanted = fresh()
    assert torch.equal(result, wanted)
    assert torch.equal(movie(other), wanted)
    assert torch.equal(movie(wan), wanted)
    assert visparse.restore(other)
    assert serving(wan) is not None


def test_lora_between_runs(wan, make_wan, movie, sparse):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    settings = {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}

    def add(pipe: Any) -> None:
        torch.manual_seed(5)
        pipe.transformer.add_adapter(peft.LoraConfig(**settings))

    sparse(wan)
    plain = movie(wan)
    add(wan)
    with_lora = movie(wan)
    other = make_wan()
    add(other)
    sparse(other)
    assert torch.equal(with_lora, movie(other))
    wan.transformer.disable_adapters()
    assert torch.equal(movie(wan), plain)
    assert not torch.equal(with_lora, plain)
