"""HunyuanVideo: two kinds of blocks, text behind the grid, a mask that hides padded text."""

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

import visparse

GRID, TEXT = (3, 4, 5), 7
SMALL = {"window": (1, 2, 2), "stride": 1, "dense_steps": 0}
WHOLE = {"window": GRID, "stride": 1, "dense_steps": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    ).eval()


@pytest.fixture
def denoise(model):
    def run(valid=(TEXT, TEXT), text_noise=0.0, called=None) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        mask = torch.arange(TEXT)[None] < torch.tensor(valid)[:, None]
        text = torch.randn(2, TEXT, 16, generator=random)
        text[~mask] += text_noise
        with torch.no_grad():
            return (called or model)(
                hidden_states=torch.randn(2, 4, GRID[0], GRID[1] * 2, GRID[2] * 2, generator=random),
                timestep=torch.tensor([500, 500]),
                encoder_hidden_states=text,
                encoder_attention_mask=mask.long(),
                pooled_projections=torch.randn(2, 8, generator=random),
                guidance=torch.tensor([6000.0, 6000.0]),
            ).sample

    return run


def processors(model):
    return [block.attn.processor for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


@pytest.mark.parametrize("valid", [(TEXT, TEXT), (3, 5)])
def test_whole_window_is_dense_and_a_small_one_is_not(model, denoise, valid):
    before, objects = denoise(valid), processors(model)
    with visparse.sparsify(model, "dense"):
        assert torch.equal(denoise(valid), before)
    with visparse.sparsify(model, "neighborhood", strict=True, **WHOLE) as handle:
        whole = denoise(valid)
        report = handle.report().models[0]
        assert (report.grid, report.tokens) == (GRID, 60 + TEXT)
        assert [layer.sparse_calls for layer in report.layers] == [1, 1, 1]
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        small = denoise(valid)
    torch.testing.assert_close(whole, before, atol=2e-5, rtol=1e-4)
    assert (small - before).abs().max() > 100 * (whole - before).abs().max()
    assert all(new is old for new, old in zip(processors(model), objects, strict=True))
    assert all(type(processor) is HunyuanVideoAttnProcessor2_0 for processor in objects)
    assert torch.equal(denoise(valid), before)


def test_the_text_refiner_stays_dense(model, denoise):
    refiner = model.context_embedder.token_refiner.refiner_blocks[0].attn
    before = refiner.processor
    with visparse.sparsify(model, "neighborhood", **SMALL) as handle:
        assert refiner.processor is before
        denoise()
        assert len(handle.report().models[0].layers) == 3


def test_padded_text_is_seen_by_nobody(model, denoise):
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        assert torch.equal(denoise((3, 5), text_noise=9.0), denoise((3, 5)))
        assert not torch.equal(denoise((7, 7)), denoise((3, 5)))


def test_compiled_blocks_with_a_mask(model, denoise):
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        eager = denoise((3, 5))
        torch.compiler.reset()
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for block in blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        try:
            torch.testing.assert_close(denoise((3, 5)), eager, atol=1e-5, rtol=1e-4)
        finally:
            for block in blocks:
                block._compiled_call_impl = None
            torch.compiler.reset()


def attention(model, mask):
    random = torch.Generator().manual_seed(2)
    hidden, text = torch.randn(2, 60, 64, generator=random), torch.randn(2, TEXT, 64, generator=random)
    with torch.no_grad():
        return torch.cat(model.transformer_blocks[0].attn(hidden, text, mask), dim=1)


def test_any_mask_over_keys_is_served(model, denoise):
    random = torch.Generator().manual_seed(3)
    hidden = torch.rand(2, 1, 1, 67, generator=random) < 0.5
    masks = [hidden, hidden[:1], torch.randn(2, 2, 1, 67, generator=random), hidden.expand(2, 2, 1, 67)]
    dense = [attention(model, mask) for mask in masks]
    with visparse.sparsify(model, "neighborhood", strict=True, **WHOLE):
        denoise()
        for mask, wanted in zip(masks, dense, strict=True):
            torch.testing.assert_close(attention(model, mask), wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(dense[0], dense[1], atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 1, 67, 67), (67, 67), (1, 67)])
def test_other_masks_run_dense_and_say_so(model, denoise, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 3] = False
    dense = attention(model, mask)
    with visparse.sparsify(model, "neighborhood", **SMALL) as handle:
        denoise()
        with pytest.warns(RuntimeWarning, match=r"an attention mask of shape .*\[batch, 1, 1, keys\] can be served"):
            assert torch.equal(attention(model, mask), dense)
        layer = handle.report().models[0].layers[0]
        assert (layer.sparse_calls, layer.dense_calls) == (1, 1)
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        denoise()
        with pytest.raises(RuntimeError, match=r"strict: .*attention mask"):
            attention(model, mask)
