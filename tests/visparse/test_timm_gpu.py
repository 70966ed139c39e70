"""timm's vision transformers on a GPU: prefix tokens, a ragged grid, tiles chosen at each call, compiled."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import visparse
from visparse.compensation import Proxies
from visparse.layout import Layout
from visparse.patterns import Neighborhood, TopK
from visparse.plan import SparsePlan

pytestmark = pytest.mark.gpu
GRID, PREFIX = (1, 37, 29), 5
WINDOW = {"window": (1, 9, 9), "stride": (1, 2, 2)}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    size = GRID[1] * 14, GRID[2] * 14
    shape = {"img_size": size, "patch_size": 14, "embed_dim": 192, "num_heads": 3, "depth": 2, "num_classes": 0}
    model = VisionTransformer(**shape, reg_tokens=PREFIX - 1).eval().requires_grad_(False)
    for layer in model.blocks:
        layer.attn.qkv.weight.normal_(std=0.1)
    return model.to("cuda", torch.float16)


@pytest.fixture
def pictures(vit):
    return torch.randn(2, 3, *vit.patch_embed.img_size).to("cuda", torch.float16)


def error(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def test_a_window_is_what_timm_computes_with_a_mask(vit, pictures):
    at = Layout(GRID).coordinates()
    mask = torch.ones(PREFIX + len(at), PREFIX + len(at), dtype=torch.bool)
    mask[PREFIX:, PREFIX:] = Neighborhood(**WINDOW).keep(at, at, GRID)
    dense, wanted = vit.forward_features(pictures), vit.forward_features(pictures, attn_mask=mask.cuda())
    with visparse.sparsify(vit, "neighborhood", strict=True, **WINDOW) as handle:
        got = vit.forward_features(pictures)
        found = handle.report().models[0]
    assert (found.grid, found.layers[1].sparse_calls) == (GRID, 1)
    assert error(got, wanted) < 5e-3
    assert error(dense, wanted) > 0.05
    assert torch.equal(vit.forward_features(pictures), dense)


@pytest.mark.parametrize("compiled", [False, True])
def test_tiles_chosen_at_each_call(vit, pictures, compiled):
    dense = vit(pictures)
    model = torch.compile(vit) if compiled else vit
    errors = []
    for share in (1.0, 0.3):
        plan = SparsePlan(
            name="pooled",
            patterns={"top": TopK(share=share, score="pooled").to_dict()},
            default="top",
            proxies=Proxies(),
        )
        with visparse.sparsify(model, plan, strict=True):
            errors.append(error(model(pictures), dense))
    assert errors[0] < 5e-3
    assert errors[0] < errors[1] < 1
