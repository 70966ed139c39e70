"""Plans with compensations on a GPU give what they give on the CPU, wait for nothing, and compile to one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from visparse.compensation.call import Call
from visparse.compensation.overlap import overlaps
from visparse.compensation.refresh import Overlap
from visparse.compensation.tiles import tile_blocks, tiles_for
from visparse.layout import Layout
from visparse.patterns import Neighborhood, TopK, TopP
from visparse.plan import SparsePlan
from visparse.router import Router
from visparse.rules import ModelFingerprint
from visparse.settings import Settings
from visparse.steps import Clock

pytestmark = pytest.mark.gpu

LAYOUTS = [Layout((5, 17, 24), before=3, after=40), Layout((1, 56, 56)), Layout((2, 5, 6))]
NEAR = {"patterns": {"p": Neighborhood(window=(1, 5, 5))}, "default": "p"}
PLANS: dict[str, dict[str, Any]] = {
    "proxies": NEAR | {"proxies": {}},
    "two proxies a tile, two levels": NEAR | {"proxies": {"per_tile": 2, "levels": 2}},
    "samples": NEAR | {"proxies": {"kind": "sample"}},
    "agents": NEAR | {"proxies": {"kind": "agent"}},
    "statistics": NEAR | {"statistics": {}},
    "residual": NEAR | {"residual": {"storage": "full"}},
    "pooled": {"patterns": {"p": TopK(share=0.25, score="pooled")}, "default": "p", "proxies": {}},
    "parts": {
        "patterns": {"p": TopK(share=0.25, score="pooled", parts=8)},
        "default": "p",
        "proxies": {"per_tile": 2},
    },
    "top p": {"patterns": {"p": TopP(mass=0.5, score="pooled", most=0.5)}, "default": "p", "proxies": {}},
    "foveal": {
        "patterns": {"p": TopK(share=0.25, score="mass_variance", sample=1, refresh=(3,))},
        "default": "p",
        "proxies": {},
        "residual": {"storage": "full", "refresh": (3,)},
    },
    "foveal by overlap": {
        "patterns": {"p": TopK(share=0.25, score="mass_variance", sample=1, refresh=Overlap(below=0.9))},
        "default": "p",
        "proxies": {},
        "residual": {"storage": "full", "refresh": Overlap(below=0.9)},
    },
    "spread": {"patterns": {"p": TopK(share=0.25, sample=1, spread=True)}, "default": "p", "proxies": {"per_tile": 4}},
}


class Context:
    num_inference_steps, name = 6, "cond"

    def __init__(self, step: int) -> None:
        self.step_index = step


def router_of(plan: dict[str, Any], head_dim: int) -> Router:
    made = SparsePlan(**{"name": "test", "dense_steps": 2} | plan)
    model = ModelFingerprint(model_class="Any", layers=1, heads=3, head_dim=head_dim)
    return Router(made, model, Settings(strict=True), Clock(made.stage))


def inputs(layout: Layout, head_dim: int, step: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (batch, layout.tokens, 3, head_dim)
    # keys and values of a low rank, so that scores of tiles differ clearly and both devices choose alike
    shift = torch.randn(batch, layout.tokens // 64 + 1, 3, head_dim, generator=generator).repeat_interleave(64, 1)
    x = [torch.randn(shape, generator=generator) + shift[:, : layout.tokens] for _ in range(3)]
    return x[0].half(), x[1].half(), x[2].half()


def dense(states: tuple[Tensor, ...]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in states)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def call(router: Router, step: int, layout: Layout, states: tuple[Tensor, ...]) -> Tensor:
    router.clock.enter(Context(step))
    router.begin(layout, None, states[0].device)
    named = dict(zip(("query", "key", "value"), states, strict=True))
    return router.routes[0].attention(named, lambda: dense(states), False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout.grid)))
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gpu_and_cpu_agree(plan: dict[str, Any], head_dim: int, layout: Layout) -> None:
    batch = 2
    here, there = router_of(plan, head_dim), router_of(plan, head_dim)
    for step in range(5):
        states = inputs(layout, head_dim, step, batch)
        wanted = call(here, step, layout, tuple(x.float() for x in states))
        out = call(there, step, layout, tuple(x.cuda() for x in states)).cpu().float()
        assert out.isfinite().all()
        off = (out - wanted).norm(dim=-1) > 3e-2 * wanted.norm(dim=-1).mean()
        assert off.float().mean() < 0.01, (step, float(off.float().mean()))  # but for ties
    stats = there.routes[0].stats
    assert stats.compensated > 0
    if there.compensation is not None and there.compensation._tiled((next(iter(plan["patterns"].values())),)):
        wanted = float(here.routes[0].stats.compensated_density)  # tiles are the same on both devices
        assert float(stats.compensated_density) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", ["proxies", "pooled", "parts", "foveal", "spread"])
def test_sparse_steps_do_not_wait_for_the_gpu(name: str) -> None:
    layout, head_dim = LAYOUTS[0], 128
    router = router_of(PLANS[name] | {"dense_steps": 2}, head_dim)
    if name in ("pooled", "parts"):
        router.settings.__dict__["impl"] = "triton"  # the Hopper kernel's program for fresh lists has to wait
    states = [tuple(x.cuda() for x in inputs(layout, head_dim, step, 1)) for step in range(6)]
    for step in range(5):
        call(router, step, layout, states[step])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(router, 5, layout, states[5])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout.grid)))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_overlap_is_that_of_the_cpu(head_dim: int, layout: Layout) -> None:
    selectors = [TopK(share=0.25, refresh=Overlap(), sample=4), TopP(mass=0.5, most=0.5, refresh=Overlap(), sample=1)]
    patterns, found = (selectors[0], selectors[1], selectors[0]), []
    q, k, v = inputs(layout, head_dim, 0, 2)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        tiles = tiles_for(layout, *tile_blocks(head_dim), torch.device(device), serpentine=True)
        old = torch.rand(2, 3, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(0)) < 0.5
        call = Call(q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), None, None)
        found.append(overlaps(call, tiles, 1, "aba", patterns, old.to(device), "auto").cpu())
    assert 0.1 < float(found[0].mean()) < 0.9
    assert float((found[0] - found[1]).abs().mean()) < 0.02  # but for ties


def test_looking_does_not_wait_for_the_gpu() -> None:
    layout, head_dim = LAYOUTS[0], 128
    router = router_of(PLANS["foveal by overlap"] | {"residual": {}}, head_dim)
    states = tuple(x.cuda() for x in inputs(layout, head_dim, 0, 1))
    for step in range(3):
        call(router, step, layout, states)
    router.clock.enter(Context(3))
    router.begin(layout, None, states[0].device)
    named = dict(zip(("query", "key", "value"), states, strict=True))
    watch = router.compensation.watch
    assert watch.looking
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        router.routes[0].attention(named, lambda: dense(states), False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watch._sums) == 1
    assert (watch.refreshed, watch.overlaps) == ([], {2: pytest.approx(1.0, abs=0.02)})


@pytest.mark.parametrize("plan", ["foveal", "foveal by overlap"])
def test_compiled_code_serves_all_kinds_of_steps_with_one_graph(plan: str) -> None:
    layout, head_dim = LAYOUTS[0], 128
    eager, compiled = router_of(PLANS[plan], head_dim), router_of(PLANS[plan], head_dim)

    def block(*states: Tensor) -> Tensor:
        named = dict(zip(("query", "key", "value"), states, strict=True))
        return compiled.routes[0].attention(named, lambda: dense(states), False) * 2

    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(block, fullgraph=True, backend=counter)
    for step in range(6):
        states = tuple(x.cuda() for x in inputs(layout, head_dim, step, 1))
        wanted = call(eager, step, layout, states) * 2
        compiled.clock.enter(Context(step))
        compiled.begin(layout, None, states[0].device)
        torch.testing.assert_close(run(*states), wanted, atol=2e-3, rtol=2e-3)
    assert counter.frame_count == 1
