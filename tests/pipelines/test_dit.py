"""DiT through the front door: scaled_dot_product_attention, no cache context, batched guidance."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import visparse


def objects(model):
    return [block.attn1.processor for block in model.transformer_blocks]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dense_bitwise_whole_window_close_small_window_different(dit, picture, guidance):
    before, originals = picture(dit, guidance=guidance), objects(dit.transformer)
    with visparse.sparsify(dit, "dense"):
        assert torch.equal(picture(dit, guidance=guidance), before)
    with visparse.sparsify(dit, "neighborhood", window=(1, 8, 8), stride=1, dense_steps=0) as handle:
        whole = picture(dit, guidance=guidance)
        assert handle.report().models[0].grid == (1, 8, 8)
        assert handle.report().models[0].layers[2].sparse_calls == 3
    with visparse.sparsify(dit, "neighborhood", window=(1, 3, 3), stride=1, dense_steps=0):
        small = picture(dit, guidance=guidance)
    torch.testing.assert_close(whole, before, atol=2e-5, rtol=1e-4)
    assert (small - before).abs().max() > 100 * (whole - before).abs().max()
    assert all(new is old for new, old in zip(objects(dit.transformer), originals, strict=True))
    assert all(type(processor) is AttnProcessor2_0 for processor in originals)
    assert torch.equal(picture(dit, guidance=guidance), before)


def test_share_of_steps_comes_from_the_scheduler_and_runs_are_told_apart(dit, picture):
    with visparse.sparsify(dit, "neighborhood", dense_steps=0.5) as handle:
        for run in (1, 2):
            picture(dit, steps=4)
            model = handle.report().models[0]
            assert (model.runs, model.steps, model.dense_steps, model.step_source) == (run, 4, 2, "timestep")
            assert (model.layers[0].dense_calls, model.layers[0].sparse_calls) == (2, 2)


def test_plan_without_steps_reads_no_timestep(dit, picture):
    with visparse.sparsify(dit, "neighborhood", dense_steps=0) as handle:
        picture(dit)
        assert handle.report().models[0].step_source is None
