"""Wan pipelines through the front door: exactness, undo, steps, copies, what happens when something is wrong."""

import copy
import pickle

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import visparse
from visparse.plan import SparsePlan
from visparse.presets import load_plan
from visparse.rules import Rule
from visparse.templates import PatternTemplate

GRID = (4, 4, 6)
SMALL = {"window": (2, 3, 3), "stride": 1, "dense_steps": 0}
WHOLE = {"window": GRID, "stride": 1, "dense_steps": 0}


def processors(model):
    return [block.attn1.processor for block in model.blocks]


def untouched(model):
    return (
        all(type(p) is WanAttnProcessor for p in processors(model))
        and not model._forward_pre_hooks
        and not model._forward_hooks
        and not hasattr(model, "_visparse")
        and not hasattr(model, "_visparse_context")
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dense_is_bitwise_the_same_and_restore_brings_back_the_same_objects(wan, film, guidance):
    before, objects, keys = film(wan, guidance=guidance), processors(wan.transformer), set(wan.transformer.state_dict())
    handle = visparse.sparsify(wan, "dense")
    assert all(new is not old for new, old in zip(processors(wan.transformer), objects, strict=True))
    assert torch.equal(film(wan, guidance=guidance), before)
    assert set(wan.transformer.state_dict()) == keys
    assert handle.report().models[0].layers[0].dense_calls == 3 * (2 if guidance > 1 else 1)
    assert handle.restore() is True
    assert all(new is old for new, old in zip(processors(wan.transformer), objects, strict=True))
    assert untouched(wan.transformer)
    assert torch.equal(film(wan, guidance=guidance), before)
    assert handle.restore() is False
    assert visparse.restore(wan) is False


@pytest.mark.parametrize(
    "size",
    [
        {"batch": 2, "guidance": 3.0},
        {"num_frames": 17},  # 5 latent frames
        {"height": 112, "width": 208, "num_frames": 9},  # grid 3 x 7 x 13
    ],
)
def test_whole_window_is_dense_within_rounding_and_a_small_one_is_not(wan, film, size):
    dense = film(wan, **size)
    latent = dense.shape[-3:]
    grid = (latent[0], latent[1] // 2, latent[2] // 2)
    with visparse.sparsify(wan, "neighborhood", **{**WHOLE, "window": grid}) as handle:
        whole = film(wan, **size)
        assert handle.report().models[0].grid == grid
        assert handle.report().models[0].layers[0].sparse_calls == 3 * (2 if size.get("guidance", 1) > 1 else 1)
    with visparse.sparsify(wan, "neighborhood", **SMALL):
        small = film(wan, **size)
    torch.testing.assert_close(whole, dense, atol=2e-5, rtol=1e-4)
    assert (small - dense).abs().max() > 100 * (whole - dense).abs().max()
    assert untouched(wan.transformer)


def test_two_resolutions_in_turn(wan, film):
    with visparse.sparsify(wan, "neighborhood", **SMALL):
        first = film(wan)
        film(wan, height=96, num_frames=9)
        assert visparse.report(wan).models[0].grid == (3, 6, 6)
        assert torch.equal(film(wan), first)


def test_dense_steps_and_layers_count(wan, film):
    dense = film(wan, num_inference_steps=4)
    with visparse.sparsify(
        wan, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=0.5, dense_layers=[1]
    ) as handle:
        film(wan, num_inference_steps=4)
        model = handle.report().models[0]
        assert (model.steps, model.dense_steps, model.step_source) == (4, 2, "cache context")
        assert [(x.sparse_calls, x.dense_calls, x.state) for x in model.layers] == [
            (2, 2, "sparse"),
            (0, 4, "dense"),
            (2, 2, "sparse"),
        ]
        assert model.layers[1].why == "dense layer"
    with visparse.sparsify(wan, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=4):
        assert torch.equal(film(wan, num_inference_steps=4), dense)


def test_rules_choose_heads_and_steps(wan, film):
    patterns = {
        "all": {"name": "dense"},
        "near": {"name": "neighborhood", "window": [2, 3, 3]},
        "none": {"name": "skip"},
    }
    plan = SparsePlan(
        name="mixed",
        patterns={name: PatternTemplate(entry) for name, entry in patterns.items()},
        default="all",
        assignment=(
            Rule(pattern="near", layers=[0, 2], heads=1, steps="1:2"),
            Rule(pattern="none", layers=2, heads=0, steps=1),
        ),
    )
    with visparse.sparsify(wan, plan) as handle:
        film(wan)
        model = handle.report().models[0]
    assert [(x.sparse_calls, x.dense_calls) for x in model.layers] == [(1, 2), (0, 3), (1, 2)]
    assert [x.state for x in model.layers] == ["sparse", "dense", "sparse"]  # though the last step was dense
    assert model.layers[2].density < model.layers[0].density < 1


def test_second_sparsify_replaces_the_first(wan, film):
    objects = processors(wan.transformer)
    first = visparse.sparsify(wan, "dense")
    second = visparse.sparsify(wan, "neighborhood", **SMALL)
    assert first.restore() is False
    assert len(wan.transformer._forward_pre_hooks) == 1
    film(wan)
    assert second.report().models[0].layers[0].sparse_calls == 3
    second.restore()
    assert all(new is old for new, old in zip(processors(wan.transformer), objects, strict=True))
    assert untouched(wan.transformer)


def test_failing_sparsify_leaves_everything_as_it_was(wan, film, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'radial'"):
        visparse.sparsify(wan, "radail")
    assert untouched(wan.transformer)
    before = visparse.sparsify(wan, "dense")
    with pytest.raises(ValueError, match="window"):
        visparse.sparsify(wan, "neighborhood", window=-3)
    assert "installed on transformer" in repr(before)
    before.restore()

    def broken(model, clock):
        raise RuntimeError("no room")

    monkeypatch.setattr("visparse.context.listen", broken)
    with pytest.raises(RuntimeError, match="no room"):
        visparse.sparsify(wan, "dense")
    assert untouched(wan.transformer)


def test_window_larger_than_the_grid_is_an_error_and_nothing_stays_patched(wan, film):
    before, objects = film(wan), processors(wan.transformer)
    handle = visparse.sparsify(wan, "neighborhood", window=(2, 99, 3), stride=1, dense_steps=1)
    with pytest.raises(ValueError, match=r"window: 99 .* height .* so visparse has restored the model"):
        film(wan)
    assert handle.report().models[0].layers[0].dense_calls == 0  # before the first dense step, not after it
    assert untouched(wan.transformer)
    assert all(new is old for new, old in zip(processors(wan.transformer), objects, strict=True))
    assert handle.restore() is False
    assert torch.equal(film(wan), before)


def test_a_bad_request_does_not_end_a_plan_that_works(wan, film):
    with visparse.sparsify(wan, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=0) as handle:
        first = film(wan)
        with pytest.raises(ValueError, match=r"window: 2 .* frames(?!.*restored)"):
            film(wan, num_frames=1)
        assert "installed on transformer" in repr(handle)
        assert torch.equal(film(wan), first)


@pytest.mark.parametrize("restored", [True, False], ids=["in place", "after a good run"])
def test_nan_in_q_is_named_and_nothing_stays_patched(wan, film, restored):
    before, objects = film(wan), processors(wan.transformer)
    handle = visparse.sparsify(wan, "neighborhood", **SMALL)
    if not restored:
        film(wan)
    weight = wan.transformer.blocks[1].attn1.norm_q.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer 1: q: wanted finite values.* got nan at .*look for an overflow before"
    ):
        film(wan)
    assert untouched(wan.transformer) is restored
    handle.restore()
    assert all(new is old for new, old in zip(processors(wan.transformer), objects, strict=True))
    with torch.no_grad():
        weight.copy_(good)
    assert torch.equal(film(wan), before)


def test_an_error_in_one_transformer_restores_both(make_wan, wan_transformer, film):
    pipe = make_wan(transformer_2=wan_transformer, boundary_ratio=0.5)
    visparse.sparsify(pipe, "neighborhood", window=(2, 99, 3), stride=1, dense_steps=0)
    with pytest.raises(ValueError, match="has restored the model"):
        film(pipe)
    assert untouched(pipe.transformer)
    assert untouched(pipe.transformer_2)


def test_exception_in_the_middle_of_a_run_leaves_a_clean_start(wan, film):
    with visparse.sparsify(wan, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=1):
        first = film(wan)

        def stop(pipe, step, timestep, kwargs):
            if step == 1:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            film(wan, callback_on_step_end=stop)
        assert torch.equal(film(wan), first)
        model = visparse.report(wan).models[0]
        assert (model.runs, model.layers[0].dense_calls, model.layers[0].sparse_calls) == (3, 1, 2)


def test_both_transformers_share_the_step(make_wan, wan_transformer, film):
    pipe = make_wan(transformer_2=wan_transformer, boundary_ratio=0.7)
    objects = processors(pipe.transformer) + processors(pipe.transformer_2)
    with visparse.sparsify(pipe, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=1) as handle:
        film(pipe, num_inference_steps=4)
        models = {model.component: model.layers[0] for model in handle.report().models}
    calls = {name: (x.dense_calls, x.sparse_calls) for name, x in models.items()}
    assert calls["transformer"][0] == 1  # the run's first step
    assert calls["transformer_2"][0] == 0  # its own first step is not the run's
    assert sum(sum(pair) for pair in calls.values()) == 4
    assert calls["transformer_2"][1] > 0
    assert processors(pipe.transformer) + processors(pipe.transformer_2) == objects


def test_two_pipelines_with_different_plans_do_not_mix(make_wan, film):
    one, two = make_wan(), make_wan()
    dense = film(one)
    visparse.sparsify(one, "dense")
    visparse.sparsify(two, "neighborhood", **SMALL)
    sparse = film(two)
    assert torch.equal(film(one), dense)
    assert not torch.equal(sparse, dense)
    visparse.restore(one)
    assert torch.equal(film(two), sparse)


def test_deepcopy_is_sparse_too_and_independent(wan, film):
    visparse.sparsify(wan, "neighborhood", **SMALL)
    expected = film(wan)
    twin = copy.deepcopy(wan)
    visparse.restore(wan)
    assert untouched(wan.transformer)
    assert torch.equal(film(twin), expected)
    assert visparse.report(twin).models[0].layers[0].sparse_calls == 3
    assert visparse.restore(twin) is True
    assert untouched(twin.transformer)
    assert torch.equal(film(twin), film(wan))


def test_processor_and_model_can_be_pickled(wan, film):
    visparse.sparsify(wan, "neighborhood", **SMALL)
    expected = film(wan)
    processor = pickle.loads(pickle.dumps(wan.transformer.blocks[0].attn1.processor))
    assert isinstance(processor, WanAttnProcessor)
    assert processor.visparse_route.layer == 0
    wan.register_modules(transformer=pickle.loads(pickle.dumps(wan.transformer)))
    assert torch.equal(film(wan), expected)
    assert visparse.restore(wan) is True
    assert untouched(wan.transformer)


def test_dense_steps_run_through_the_users_backend(wan, film):
    wan.transformer.set_attention_backend("_native_math")
    try:
        before = film(wan)
        with visparse.sparsify(wan, "dense"):
            assert torch.equal(film(wan), before)
        visparse.sparsify(wan, "dense")
        wan.transformer.set_attention_backend("_native_math")
        assert wan.transformer.blocks[0].attn1.processor._attention_backend is not None
        assert torch.equal(film(wan), before)
    finally:
        visparse.restore(wan)
        wan.transformer.reset_attention_backend()


def test_fallbacks_are_recorded_and_strict_raises(wan_transformer):
    model = wan_transformer
    hidden = torch.randn(1, 16, 4, 8, 12)
    call = {"hidden_states": hidden, "timestep": torch.tensor([5]), "encoder_hidden_states": torch.randn(1, 4, 32)}
    visparse.sparsify(model, "neighborhood", **SMALL)
    with pytest.warns(RuntimeWarning, match="gradients are wanted"):
        model(**call)
    layer = visparse.report(model).models[0].layers[0]
    assert (layer.state, layer.sparse_calls, layer.dense_calls) == ("not served", 0, 1)
    assert next(iter(layer.fallbacks)).startswith("gradients")
    visparse.sparsify(model, "neighborhood", strict=True, **SMALL)
    with pytest.raises(RuntimeError, match=r"strict: .*gradients"):
        model(**call)
    with torch.no_grad():
        model(**call)
        attention, tokens = model.blocks[0].attn1, torch.randn(1, 96, 64)
        with pytest.raises(RuntimeError, match="attention mask"):
            attention(tokens, None, torch.zeros(1, 1, 96, 96))
        with pytest.raises(RuntimeError, match=r"cross attention \(96 queries, 7 keys\)"):
            attention(tokens, tokens[:, :7])
        with pytest.raises(RuntimeError, match="90 tokens, the grid 96"):
            attention(tokens[:, :90])


def test_processor_replaced_by_somebody_else_is_noticed_and_stays(wan, film):
    visparse.sparsify(wan, "neighborhood", **SMALL)
    other = WanAttnProcessor()
    wan.transformer.blocks[1].attn1.set_processor(other)
    with pytest.warns(RuntimeWarning, match="replaced after sparsify"):
        film(wan)
    assert visparse.report(wan).models[0].layers[1].state == "not served"
    visparse.restore(wan)
    assert wan.transformer.blocks[1].attn1.processor is other


def test_layer_that_cannot_be_served_is_reported(wan, film):
    class Own:
        def __call__(self, attn, hidden_states, *rest):
            return hidden_states

    wan.transformer.blocks[1].attn1.processor = own = Own()
    with pytest.raises(ValueError, match=r"strict: blocks.1.attn1 cannot be served: Own.__call__ calls neither"):
        visparse.sparsify(wan, "neighborhood", strict=True, **SMALL)
    with pytest.warns(RuntimeWarning, match=r"dense against the plan: Own.__call__ calls neither"):
        handle = visparse.sparsify(wan, "neighborhood", **SMALL)
    film(wan)
    assert [layer.state for layer in handle.report().models[0].layers] == ["sparse", "not served", "sparse"]
    assert wan.transformer.blocks[1].attn1.processor is own
    for block in wan.transformer.blocks:
        block.attn1.processor = own
    with pytest.raises(ValueError, match=r"no attention layer of WanTransformer3DModel can be served: Own"):
        visparse.sparsify(wan, "dense")


def test_plan_for_another_model(wan):
    shape = {"model_class": "WanTransformer3DModel", "layers": 30, "heads": 12, "head_dim": 128}
    plan = visparse.SparsePlan.from_dict(load_plan("radial").to_dict() | {"model": shape})
    with pytest.raises(ValueError, match="made for another model: layers 30, this model has 3"):
        visparse.sparsify(wan, plan)
    assert untouched(wan.transformer)


def test_bare_model_takes_the_step_from_the_timestep(wan_transformer):
    hidden, text = torch.randn(1, 16, 4, 8, 12), torch.randn(1, 4, 32)
    with visparse.sparsify(wan_transformer, "neighborhood", window=(2, 3, 3), stride=1, dense_steps=1) as handle:
        with torch.no_grad():
            for timestep in (900, 900, 500, 500, 900, 500):
                wan_transformer(hidden, torch.tensor([timestep]), text)
        model = handle.report().models[0]
    assert (model.component, model.runs, model.step_source) == ("model", 2, "timestep")
    assert (model.layers[0].dense_calls, model.layers[0].sparse_calls) == (1, 1)


def test_share_of_steps_needs_their_number(wan_transformer):
    visparse.sparsify(wan_transformer, "radial")
    with pytest.raises(ValueError, match=r"dense_steps=0.24 is a share.*dense_steps=3"):
        wan_transformer(torch.randn(1, 16, 4, 8, 12), torch.tensor([900]), torch.randn(1, 4, 32))


def test_grids_of_a_plan(wan, film):
    plan = SparsePlan(
        name="one size",
        patterns={"near": PatternTemplate({"name": "neighborhood", "window": 2})},
        default="near",
        grids=((9, 9, 9),),
    )
    before = film(wan)
    visparse.sparsify(wan, plan)
    with pytest.warns(RuntimeWarning, match="not one of the plan's grids"):
        assert torch.equal(film(wan), before)
    visparse.sparsify(wan, plan, strict=True)
    with pytest.raises(RuntimeError, match="not one of the plan's grids"):
        film(wan)


def test_lora_after_sparsify(wan, film):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    before = film(wan)
    visparse.sparsify(wan, "dense")
    wan.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = film(wan)
    wan.transformer.delete_adapters("default")
    assert not torch.equal(changed, before)
    assert torch.equal(film(wan), before)
