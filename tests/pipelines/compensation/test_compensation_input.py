"""Bad input of compensated plans is refused before the first step; what they did is reported as it was."""

import pytest
import torch


@pytest.mark.parametrize(
    ("plan", "changes", "text"),
    [
        ("foveal", {"dense_steps": 0}, r"foveal, residual: wanted a dense step .*got none .*use dense_steps=1"),
        ("neighborhood", {"dense_steps": 0, "residual": None}, r"statistics: wanted a dense step .*got none"),
        ("neighborhood", {"dense_steps": {"last": 2}}, r"statistics, residual: wanted a dense step .*last 2 steps"),
        ("foveal", {"refresh": 0}, r"refresh: wanted None \(never\), an int > 0 .*got 0; leave it out"),
        ("foveal", {"residual": {"refresh": 0}}, r"residual: refresh: wanted None .*got 0"),
        ("neighborhood", {"statistics": {"refresh": -1}}, r"statistics: refresh: wanted None .*got -1"),
        ("foveal", {"share": 0}, r"share: wanted a share of the tiles in \(0, 1\], got 0; 0.125 is an eighth"),
        ("foveal", {"proxies": {"per_tile": 64}}, r"proxies: per_tile: wanted a power of two from 1 to 32, got 64"),
        (
            "foveal",
            {"proxies": {"tiles": "cubes"}},
            r"proxies: tiles: wanted one of auto, boxes, serpentine, got 'cubes'",
        ),
        ("foveal", {"block_k": 48}, r"block_k must be a positive multiple of 32, .*got 48"),
        ("foveal", {"residual": {"storage": "low-rank", "rank": 33}}, r"rank: wanted at most 32 .*got 33; 16 is usual"),
        ("foveal", {"residual": {"memory": 0}}, r"residual: memory: wanted GiB above 0, got 0"),
    ],
)
def test_bad_plans_are_refused_by_sparsify(wan, plan, changes, text, sparse, untouched):
    with pytest.raises(ValueError, match=text):
        sparse(wan, plan, **changes)
    assert untouched(wan.transformer)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"residual": {"memory": 1e-6}}, r"residual: memory: 1e-06 GiB is too little for 192 tokens: .*raise it"),
        ({"block_q": 40}, r"block_q: wanted a number of tokens that is a power of two, .*got 40"),
        ({"block_k": 160}, r"block_k: wanted a number of tokens that is a power of two, .*got 160"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused_before_the_first_step(wan, movie, changes, text, sparse, untouched):
    dense, calls = movie(wan), []
    hook = wan.transformer.blocks[0].attn1.register_forward_hook(lambda *args: calls.append(1))
    handle = sparse(wan, **changes)
    with pytest.raises(ValueError, match=text + ".*visparse has restored the model"):
        movie(wan)
    hook.remove()
    assert not calls
    assert untouched(wan.transformer)
    assert handle.restore() is False
    assert torch.equal(movie(wan), dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_q": 1024, "block_k": 512},
        {"residual": {"storage": "average", "group": (50, 50, 50)}},
        {"proxies": {"per_tile": 32}},
        {"proxies": {"levels": 2}},
    ],
    ids=str,
)
def test_what_is_larger_than_the_grid_is_cut(wan, movie, changes, sparse, layers):
    sparse(wan, **changes)
    assert movie(wan).isfinite().all()
    assert {x.sparse_calls for x in layers(wan)} == {3}


def test_one_tile_that_holds_all_is_dense(wan, movie, sparse):
    dense = movie(wan)
    sparse(wan, block_q=1024, block_k=512, residual=None)
    torch.testing.assert_close(movie(wan), dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_report_and_explanation_agree(wan, movie, guidance, sparse, at_step):
    passes = 1 + (guidance > 1)
    handle = sparse(wan, share=0.5, residual={"refresh": 0.6, "storage": "full"})
    held: list[int] = []
    movie(
        wan,
        guidance=guidance,
        callback_on_step_end=at_step(2, lambda pipe: held.append(handle.report().models[0].state_bytes or 0)),
    )
    model = handle.report().models[0]
    assert {(x.sparse_calls, x.measured_calls, x.dense_calls) for x in model.layers} == {
        (3 * passes, 2 * passes, 3 * passes)
    }
    assert all(x.state == "sparse" and not x.fallbacks for x in model.layers)
    residuals = 3 * passes * 192 * 2 * 32 * 4  # layers and passes; tokens, heads, numbers per head, bytes
    assert residuals < held[0] < 1.2 * residuals
    assert model.state_bytes == 0
    plan = handle.explain(6)
    said = [stretch for stretch in plan.stretches for _ in range(stretch.steps)]
    assert [x.sparse for x in said] == [False, False, True, True, False, True]
    assert [bool(x.measured) for x in said] == [False, True, False, False, True, False]
    for x in model.layers:
        assert x.block_density == pytest.approx(0.5)
        assert said[-1].block_density == pytest.approx((0.5, 0.5))
