"""CogVideoX: frames before channels, text in front of the grid, scaled_dot_product_attention."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed

import visparse

GRID, TEXT = (3, 4, 5), 6
SMALL = {"window": (1, 2, 2), "stride": 1, "dense_steps": 0}
WHOLE = {"window": GRID, "stride": 1, "dense_steps": 0}


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=GRID[2] * 2,
        sample_height=GRID[1] * 2,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        **changes,
    ).eval()


def denoise(model: Any, frames: int = GRID[0], text_shift: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    rotary = get_3d_rotary_pos_embed(32, ((0, 0), GRID[1:]), GRID[1:], GRID[0])
    hidden = torch.randn(2, frames, 4, GRID[1] * 2, GRID[2] * 2, generator=random)
    text = torch.randn(2, TEXT, 16, generator=random) + text_shift
    with torch.no_grad():
        return model(hidden, text, torch.tensor([500, 500]), image_rotary_emb=rotary).sample


@pytest.mark.parametrize(("changes", "frames"), [({}, 3), ({"patch_size_t": 2}, 6)], ids=["1.0", "1.5"])
def test_whole_window_is_dense_and_a_small_one_is_not(changes, frames):
    model = make(**changes)
    before, objects = denoise(model, frames), [block.attn1.processor for block in model.transformer_blocks]
    with visparse.sparsify(model, "dense"):
        assert torch.equal(denoise(model, frames), before)
    with visparse.sparsify(model, "neighborhood", strict=True, **WHOLE) as handle:
        whole = denoise(model, frames)
        report = handle.report().models[0]
        assert (report.grid, report.tokens) == (GRID, 60 + TEXT)
        assert [layer.sparse_calls for layer in report.layers] == [1, 1]
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        small = denoise(model, frames)
    torch.testing.assert_close(whole, before, atol=2e-5, rtol=1e-4)
    assert (small - before).abs().max() > 100 * (whole - before).abs().max()
    assert all(block.attn1.processor is old for block, old in zip(model.transformer_blocks, objects, strict=True))
    assert all(type(processor) is CogVideoXAttnProcessor2_0 for processor in objects)
    assert torch.equal(denoise(model, frames), before)


def test_all_of_the_picture_sees_the_text():
    model = make()
    with visparse.sparsify(model, "neighborhood", strict=True, window=(1, 1, 1), stride=1, dense_steps=0):
        changed = (denoise(model, text_shift=1.0) - denoise(model)).abs()
    assert changed.amax(dim=2).min() > 0
