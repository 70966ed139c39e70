"""FLUX: the grid stands in the positions, text in front, reference pictures behind."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import visparse
from visparse.layout import Layout
from visparse_pipelines import flux

GRID, TEXT = (1, 6, 9), 5
SMALL = {"window": (1, 2, 2), "stride": 1, "dense_steps": 0}
WHOLE = {"window": GRID, "stride": 1, "dense_steps": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()


def positions(height: int = GRID[1], width: int = GRID[2], picture: int = 0) -> torch.Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = picture
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, 3)


def denoise(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = positions() if ids is None else ids
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, ids.shape[-2], 8, generator=random),
            encoder_hidden_states=torch.randn(2, TEXT, 16, generator=random),
            pooled_projections=torch.randn(2, 8, generator=random),
            timestep=torch.tensor([0.5, 0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3),
            guidance=torch.tensor([3.5, 3.5]),
        ).sample


def processors(model):
    return [block.attn.processor for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


@pytest.mark.parametrize("reference", [False, True], ids=["text to image", "reference picture"])
def test_whole_window_is_dense_and_a_small_one_is_not(model, reference):
    ids = torch.cat([positions(), positions(3, 4, picture=1)]) if reference else positions()
    before, objects = denoise(model, ids), processors(model)
    with visparse.sparsify(model, "dense"):
        assert torch.equal(denoise(model, ids), before)
    with visparse.sparsify(model, "neighborhood", strict=True, **WHOLE) as handle:
        whole = denoise(model, ids)
        report = handle.report().models[0]
        assert (report.grid, report.tokens) == (GRID, 54 + TEXT + 12 * reference)
        assert [layer.sparse_calls for layer in report.layers] == [1, 1, 1]
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        small = denoise(model, ids)
    torch.testing.assert_close(whole, before, atol=2e-5, rtol=1e-4)
    assert (small - before).abs().max() > 100 * (whole - before).abs().max()
    assert all(new is old for new, old in zip(processors(model), objects, strict=True))
    assert all(type(processor) is FluxAttnProcessor for processor in objects)
    assert torch.equal(denoise(model, ids), before)


def test_positions_are_read_once_and_again_where_they_change(monkeypatch):
    read, ids = [], positions()
    original = flux._read_grid
    monkeypatch.setattr(flux, "_read_grid", lambda ids: read.append(1) or original(ids))
    arguments = {"hidden_states": torch.zeros(1, 54, 8), "encoder_hidden_states": torch.zeros(1, TEXT, 8)}
    assert [flux.layout(None, {**arguments, "img_ids": ids}) for _ in range(3)] == [Layout(GRID, TEXT)] * 3
    assert len(read) == 1
    ids.copy_(positions(9, 6))
    assert flux.layout(None, {**arguments, "img_ids": ids}) == Layout((1, 9, 6), TEXT)
    assert len(read) == 2
    with torch.inference_mode():
        ids = positions()
        for shape in (GRID, (1, 9, 6)):
            ids.copy_(positions(*shape[1:]))
            assert flux.layout(None, {**arguments, "img_ids": ids[None]}) == Layout(shape, TEXT)


def test_positions_that_bfloat16_rounds():
    arguments = {"hidden_states": torch.zeros(1, 300 * 2, 8), "encoder_hidden_states": torch.zeros(1, TEXT, 8)}
    ids = positions(300, 2).bfloat16()
    assert len(ids.unique(dim=0)) < 600
    assert flux.layout(None, {**arguments, "img_ids": ids}) == Layout((1, 300, 2), TEXT)


@pytest.mark.parametrize(
    "ids",
    [positions().flip(0), positions()[:-1], positions(picture=1), positions() + torch.tensor([0.0, 1.0, 0.0])],
    ids=["other order", "not whole", "no target", "not from 0"],
)
def test_other_positions_are_an_error_and_nothing_stays_patched(model, ids):
    objects = processors(model)
    visparse.sparsify(model, "neighborhood", **SMALL)
    with pytest.raises(ValueError, match=r"img_ids: wanted a picture's positions.*visparse has restored the model"):
        denoise(model, ids)
    assert all(new is old for new, old in zip(processors(model), objects, strict=True))


def test_compiled(model):
    torch.compiler.reset()
    with visparse.sparsify(model, "neighborhood", strict=True, **SMALL):
        eager = denoise(model)
        traced = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"compile first and sparsify what torch\.compile"):
            denoise(traced)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with visparse.sparsify(compiled, "neighborhood", strict=True, **SMALL):
        torch.testing.assert_close(denoise(compiled), eager, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
