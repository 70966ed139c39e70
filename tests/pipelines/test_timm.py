"""timm's vision transformers through the front door; random weights."""

import copy
import io
import pickle
from typing import ClassVar

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

import visparse
from visparse.adapter import find_adapter
from visparse.compensation import Proxies
from visparse.layout import Layout
from visparse.patterns import Neighborhood, TopK
from visparse.plan import SparsePlan
from visparse.session import session_of

SIDE = 96  # pixels: 6 x 6 patches of 16
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SHAPE = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5, "img_size": SIDE, "patch_size": 16}
WINDOW = {"window": (1, 3, 3), "stride": 1}

KINDS = {
    "plain": lambda: VisionTransformer(**SHAPE),
    "registers": lambda: VisionTransformer(**SHAPE, reg_tokens=4, init_values=0.1, qk_norm=True),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=SIDE, **SMALL),
    "no class token": lambda: VisionTransformer(**SHAPE, class_token=False, global_pool="map"),
    "parallel": lambda: VisionTransformer(**SHAPE, block_fn=ParallelThingsBlock),
    "one block": lambda: VisionTransformer(**SHAPE, block_fn=ParallelScalingBlock),
    "rope": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=84, depth=2, num_classes=5),
    "dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", img_size=SIDE, depth=2, num_classes=5),
}
PREFIX = {"plain": 1, "registers": 5, "distilled": 2, "no class token": 0, "parallel": 1, "one block": 1, "rope": 1}
PREFIX["dinov3"] = 5


def make(kind="plain"):
    torch.manual_seed(0)
    model = KINDS[kind]().eval().requires_grad_(False)
    for name, weights in model.named_parameters():
        if weights.ndim > 1:  # timm's own are so small that attention is nearly uniform
            weights.normal_(std=2 / weights[0].numel() ** 0.5 if "attn" in name else 0.2)
    return model


def picture(model, batch=2, size=None):
    height, width = size or model.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def classes(model):
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


def mask_of(window, grid, prefix):
    """What timm is given to compute a window by itself; prefix tokens see all and are seen by all."""
    at = Layout(grid).coordinates()
    kept = torch.ones(prefix + len(at), prefix + len(at), dtype=torch.bool)
    kept[prefix:, prefix:] = Neighborhood(**window).keep(at, at, grid)
    return kept


def masked(model, x, grid, window=WINDOW["window"]):
    """What a sparsified model gives with the mask of a window in place of the window."""
    with pytest.warns(RuntimeWarning, match="an attention mask of shape"):
        return model(x, attn_mask=mask_of({"window": window, "stride": 1}, grid, 1))


@pytest.fixture
def vit():
    return make()


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_is_what_timm_computes_with_a_mask(kind):
    model = make(kind)
    x, before = picture(model), classes(model)
    dense, wanted = model(x), model(x, attn_mask=mask_of(WINDOW, (1, 6, 6), PREFIX[kind]))
    with visparse.sparsify(model, "dense"):
        assert torch.equal(model(x), dense)
    with visparse.sparsify(model, "neighborhood", strict=True, **WINDOW) as handle:
        got = model(x)
        found = handle.report().models[0]
    assert (found.grid, found.tokens) == ((1, 6, 6), 36 + PREFIX[kind])
    assert found.model_class == ("Eva" if kind in ("rope", "dinov3") else "VisionTransformer")
    assert len(found.layers) == (4 if kind == "parallel" else 2)
    assert [layer.sparse_calls for layer in found.layers] == [1] * len(found.layers)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - dense).abs().max() > 100 * (got - wanted).abs().max()
    assert classes(model) == before
    assert session_of(model) is None
    assert torch.equal(model(x), dense)


def test_the_grid_follows_the_size_of_the_pictures():
    torch.manual_seed(0)
    model = VisionTransformer(**SHAPE, dynamic_img_size=True, dynamic_img_pad=True).eval().requires_grad_(False)
    with visparse.sparsify(model, "neighborhood", **WINDOW) as handle:
        for size, grid in (((80, 112), (1, 5, 7)), ((90, 100), (1, 6, 7))):
            x = picture(model, size=size)
            got = model(x)
            assert handle.report().models[0].grid == grid
            torch.testing.assert_close(got, masked(model, x, grid), atol=1e-5, rtol=1e-4)


def test_calls_that_go_round_forward_are_served(vit):
    x = picture(vit)
    mask = mask_of(WINDOW, (1, 6, 6), 1)
    wanted = vit.forward_features(x, attn_mask=mask), vit.get_intermediate_layers(x, n=2, attn_mask=mask)
    logits = vit(x, attn_mask=mask)
    with visparse.sparsify(vit, "neighborhood", **WINDOW) as handle:
        torch.testing.assert_close(vit.forward_features(x), wanted[0], atol=1e-5, rtol=1e-4)
        for got, one in zip(vit.get_intermediate_layers(x, n=2), wanted[1], strict=True):
            torch.testing.assert_close(got, one, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vit(x), logits, atol=1e-5, rtol=1e-4)
        found = handle.report().models[0]
        assert [layer.sparse_calls for layer in found.layers] == [3, 3]


def test_tiles_chosen_at_each_call(vit):
    x = picture(vit)
    dense = vit(x)
    plan = {"name": "pooled", "default": "top", "proxies": Proxies()}
    for share, near in ((1.0, True), (0.3, False)):
        top = SparsePlan(patterns={"top": TopK(share=share, score="pooled").to_dict()}, **plan)
        with visparse.sparsify(vit, top, block_q=16, block_k=32) as handle:
            got = vit(x)
            layer = handle.report().models[0].layers[0]
            assert (layer.sparse_calls, layer.state) == (1, "sparse")
        assert torch.allclose(got, dense, atol=1e-5, rtol=1e-4) == near


def test_explain_for_the_one_call(vit):
    with visparse.sparsify(vit, "neighborhood", **WINDOW) as handle:
        with pytest.raises(ValueError, match="grid: no run yet"):
            handle.explain(1)
        vit(picture(vit))
        assert "sparse" in str(handle.explain(1))
        assert "neighborhood" in repr(handle)


@pytest.mark.parametrize("name", ["neighborhood", "radial", "auto"])
def test_presets_run_without_dense_steps(vit, name):
    with visparse.sparsify(vit, name) as handle:
        vit(picture(vit))
        assert handle.plan.dense_steps == 0
        assert handle.report().models[0].layers[1].sparse_calls == 1


@pytest.mark.parametrize("name", ["foveal", "re-ttention"])
def test_presets_that_measure_at_dense_steps_are_refused(vit, name):
    before = classes(vit)
    with pytest.raises(
        ValueError, match=rf"plan '{name}' reuses .* VisionTransformer has no denoising steps; .*visparse\.search"
    ):
        visparse.sparsify(vit, name)
    assert classes(vit) == before


def test_plans_that_need_steps_are_refused(vit):
    with pytest.raises(ValueError, match=r"has dense_steps=2, and VisionTransformer has no denoising steps; use dense"):
        visparse.sparsify(vit, "neighborhood", dense_steps=2)
    patterns = {"near": {"name": "neighborhood", **WINDOW}, "dense": {"name": "dense"}}
    plan = SparsePlan(name="own", patterns=patterns, default="near", dense_steps=0.5)
    with pytest.raises(ValueError, match=r"plan 'own' has dense_steps=0.5, and Vis"):
        visparse.sparsify(vit, plan)
    rule = {"pattern": "dense", "layers": "all", "heads": "all", "steps": "3:"}
    plan = SparsePlan(name="own", patterns=patterns, default="near", assignment=(rule,))
    with pytest.raises(ValueError, match="plan 'own' has rules for some steps only, and Vis"):
        visparse.sparsify(vit, plan)


def test_what_cannot_be_served_runs_dense_with_a_reason(vit):
    x = picture(vit)
    mask = mask_of(WINDOW, (1, 6, 6), 1)
    wanted = vit(x, attn_mask=mask)
    with visparse.sparsify(vit, "neighborhood", **WINDOW) as handle:
        with pytest.warns(RuntimeWarning, match=r"an attention mask of shape \[37, 37\] was passed"):
            assert torch.equal(vit(x, attn_mask=mask), wanted)
        vit.requires_grad_(True)
        with pytest.warns(RuntimeWarning, match=r"gradients are wanted; wrap the call in torch.no_grad"):
            vit(x)
        fallbacks = handle.report().models[0].layers[0].fallbacks
    assert sum(fallbacks.values()) == 2
    with (
        visparse.sparsify(vit, "neighborhood", strict=True, **WINDOW),
        pytest.raises(RuntimeError, match=r"strict: .*gradients are wanted"),
    ):
        vit(x)


def test_training_with_dropout_runs_dense():
    torch.manual_seed(0)
    model = VisionTransformer(**SHAPE, attn_drop_rate=0.5).requires_grad_(False)
    with (
        visparse.sparsify(model, "neighborhood", **WINDOW),
        pytest.warns(RuntimeWarning, match="attention dropout was asked for"),
    ):
        model(picture(model))
    model = VisionTransformer(**SHAPE, patch_drop_rate=0.5).requires_grad_(False)
    with (
        visparse.sparsify(model, "neighborhood", **WINDOW),
        pytest.warns(RuntimeWarning, match="the sequence has 19 tokens, the grid 37"),
    ):
        model(picture(model))


def test_layers_that_do_not_call_fused_attention(vit):
    vit.blocks[0].attn.fused_attn = False
    with pytest.warns(RuntimeWarning, match="its fused_attn is off"):
        handle = visparse.sparsify(vit, "neighborhood", **WINDOW)
    with handle:
        vit(picture(vit))
        first, second = handle.report().models[0].layers
        assert (first.state, second.sparse_calls) == ("not served", 1)
        assert "set layer.fused_attn = True" in first.why
    with pytest.raises(ValueError, match=r"strict: blocks.0.attn cannot be served: its fused_attn is off"):
        visparse.sparsify(vit, "neighborhood", strict=True, **WINDOW)
    own = type(vit.blocks[1].attn)
    with visparse.sparsify(vit, "neighborhood", **WINDOW):
        vit.blocks[1].attn.fused_attn = False
        with pytest.warns(RuntimeWarning, match="its class or its forward was changed after sparsify"):
            vit(picture(vit))
        vit.blocks[0].attn.fused_attn = True
        with visparse.sparsify(vit, "neighborhood", **WINDOW):
            assert type(vit.blocks[1].attn) is own
    assert {type(block.attn) for block in vit.blocks} == {own}
    vit.blocks[0].attn.fused_attn = False
    vit.blocks[1].attn.forward = vit.blocks[1].attn.forward  # as accelerate puts its own one there
    with pytest.raises(ValueError, match=r"no attention layer .*fused_attn is off.*the forward of this Attention was"):
        visparse.sparsify(vit, "neighborhood", **WINDOW)


def test_attention_of_another_kind_is_refused():
    class Own(nn.Module):
        def __init__(self, dim, **_):
            super().__init__()
            self.mix = nn.Linear(dim, dim)

    model = VisionTransformer(**{**SHAPE, "block_fn": Own})
    with pytest.raises(
        ValueError, match="no attention of timm's own kind in this VisionTransformer, its blocks are Own"
    ):
        visparse.sparsify(model, "neighborhood")
    model = timm.create_model("vit_tiny_patch16_224", attn_layer="diff", img_size=SIDE, **{**SMALL, "num_heads": 2})
    model.eval().requires_grad_(False)
    with (
        visparse.sparsify(model, "neighborhood", **WINDOW),
        pytest.warns(RuntimeWarning, match="values have 24 channels, queries 12"),
    ):
        model(picture(model))


def test_another_class_of_that_name_is_not_timms():
    other = type("VisionTransformer", (nn.Module,), {})()
    assert find_adapter(other) is None
    with pytest.raises(ValueError, match="no denoiser that visparse knows; found model: VisionTransformer"):
        visparse.sparsify(other, "neighborhood")


def test_a_pipelines_encoder_is_left_alone(vit, wan):
    class Pipe:
        components: ClassVar = {"encoder": vit, "transformer": wan.transformer}

    with visparse.sparsify(Pipe(), "neighborhood", dense_steps=0):
        assert session_of(vit) is None
        assert session_of(wan.transformer) is not None


def test_a_second_plan_replaces_the_first(vit):
    x, before = picture(vit), classes(vit)
    dense = vit(x)
    first = visparse.sparsify(vit, "neighborhood", **WINDOW)
    visparse.sparsify(vit, "neighborhood", window=(1, 5, 5), stride=1)
    assert not first.restore()
    torch.testing.assert_close(vit(x), masked(vit, x, (1, 6, 6), window=(1, 5, 5)), atol=1e-5, rtol=1e-4)
    assert visparse.restore(vit)
    assert not visparse.restore(vit)
    assert classes(vit) == before
    assert torch.equal(vit(x), dense)


def test_what_others_put_on_top_stays(vit):
    class Other(type(vit.blocks[0].attn)):
        pass

    handle = visparse.sparsify(vit, "neighborhood", **WINDOW)
    vit.blocks[0].attn.__class__ = Other
    with pytest.warns(RuntimeWarning, match="its class or its forward was changed after sparsify"):
        vit(picture(vit))
    handle.restore()
    assert type(vit.blocks[0].attn) is Other
    assert "visparse_route" not in vars(vit.blocks[0].attn)


def test_an_error_in_the_first_call_takes_all_off(vit):
    before = classes(vit)
    visparse.sparsify(vit, "neighborhood", **WINDOW)
    x = picture(vit)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"attention layer 0: .*visparse has restored the model"):
        vit(x)
    assert classes(vit) == before
    visparse.sparsify(vit, "neighborhood", window=(1, 9, 9))
    with pytest.raises(ValueError, match="visparse has restored the model"):
        vit.forward_features(picture(vit))
    assert classes(vit) == before


def test_copies_and_pickles_are_sparse_on_their_own(vit):
    x = picture(vit)
    keys = list(vit.state_dict())
    handle = visparse.sparsify(vit, "neighborhood", **WINDOW)
    sparse = vit(x)
    assert list(vit.state_dict()) == keys
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    twins = [copy.deepcopy(vit), pickle.loads(pickle.dumps(vit)), torch.load(file, weights_only=False)]
    handle.restore()
    for twin in twins:
        assert torch.equal(twin(x), sparse)
        assert visparse.report(twin).models[0].layers[0].sparse_calls == 1 + 1
        assert visparse.restore(twin)
        assert classes(twin) == classes(vit)
        assert torch.equal(twin(x), vit(x))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["plain", "rope"])
def test_compiled(kind):
    model = make(kind)
    x = picture(model)
    dense = model(x)
    with visparse.sparsify(model, "neighborhood", **WINDOW):
        sparse = model(x)
        after = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(after(x), sparse, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dense, atol=1e-5, rtol=1e-4)
    with visparse.sparsify(compiled, "neighborhood", **WINDOW) as handle:
        torch.testing.assert_close(compiled(x), sparse, atol=1e-5, rtol=1e-4)
        assert handle.report().models[0].grid == (1, 6, 6)
    torch.testing.assert_close(compiled(x), dense, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_tiles_chosen_at_each_call(vit):
    plan = SparsePlan(
        name="pooled",
        patterns={"top": TopK(share=0.3, score="pooled").to_dict()},
        default="top",
        proxies=Proxies(),
    )
    x = picture(vit)
    with visparse.sparsify(vit, plan, block_q=16, block_k=32):
        sparse = vit(x)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    with visparse.sparsify(compiled, plan, block_q=16, block_k=32):
        torch.testing.assert_close(compiled(x), sparse, atol=1e-5, rtol=1e-4)
