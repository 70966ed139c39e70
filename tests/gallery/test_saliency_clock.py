"""The clock of the saliency study: eager calls, CUDA graphs, and attention by its kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visparse
from visparse.patterns import Band, TopK
from visparse.session import session_of

FOLDERS = (Path(__file__).parents[2] / "gallery" / "saliency_vit",)
SIDE, LAYERS, HEADS = 24 * 14, 2, 2


@pytest.fixture(scope="module")
def recipe(load_once: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Imports a file of the recipe by name."""
    return load_once


class Small(nn.Module):
    """What the clock needs of the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model(
            "vit_small_patch14_dinov2",
            img_size=SIDE,
            depth=LAYERS,
            embed_dim=64 * HEADS,
            num_heads=HEADS,
            num_classes=0,
        )
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        return self.backbone.forward_features(pictures)  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Small:
    return Small()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_times_are_for_one_picture(recipe: Callable[[str], ModuleType], model: Small) -> None:
    for plan in (None, recipe("search_prices").single_plan("band", Band(share=0.1))):
        found = recipe("search_clock").times(model, pictures(), plan)
        assert 0 < found.attention < 2 * found.whole
        assert found.besides == found.whole - found.attention
    assert session_of(model.backbone) is None


def test_a_graph_needs_a_gpu(recipe: Callable[[str], ModuleType], model: Small) -> None:
    with pytest.raises(ValueError, match="graph: wanted pictures on a CUDA device, got cpu; leave it out there"):
        recipe("search_clock").times(model, pictures(), None, graph=True)


def test_a_replay_must_be_exact(recipe: Callable[[str], ModuleType]) -> None:
    check, wanted = recipe("search_clock").check_replay, torch.ones(3, dtype=torch.float16)
    check(wanted.clone(), wanted)
    with pytest.raises(RuntimeError, match=r"graph: a replay differs from the call by up to 0\.25, so its time is not"):
        check(wanted + torch.tensor([0.0, 0.25, 0.0]).half(), wanted)
    with pytest.raises(RuntimeError, match="up to nan"):
        check(wanted * torch.nan, wanted)


@pytest.mark.parametrize("enough", [1, 4, 256])
def test_a_call_is_timed_only_if_all_of_it_was_queued(
    recipe: Callable[[str], ModuleType], model: Small, monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    clock = recipe("search_clock")
    slept: list[int] = []
    queued = [0]  # events so far: those around a call of attention come in pairs

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timing = enable_timing

        def record(self) -> None:
            queued[0] += self.timing
            self.at = 3.0 * queued[0]

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

        def query(self) -> bool:
            return slept[-1] < enough * clock._AHEAD

    fake = SimpleNamespace(Event=Event, _sleep=slept.append, synchronize=lambda: None, device=lambda _: nullcontext())
    monkeypatch.setattr(torch, "cuda", fake)
    if enough > clock._MOST_AHEAD * 2:
        with pytest.raises(RuntimeError, match="attention: a call could not be queued before its first kernel ran"):
            clock.attention_seconds(model, pictures())
        return
    assert clock.attention_seconds(model, pictures()) == pytest.approx(0.003 * LAYERS)
    assert slept == [2**n * clock._AHEAD for n in range(enough.bit_length() - 1)] + [enough * clock._AHEAD] * 7


@pytest.mark.gpu
def test_attention_is_the_time_of_its_kernels(recipe: Callable[[str], ModuleType], model: Small) -> None:
    clock, batch = recipe("search_clock"), pictures(128).to("cuda", torch.float16)
    found = clock.attention_seconds(model.to("cuda", torch.float16), batch)
    tokens = 1 + (SIDE // 14) ** 2
    q, k, v = torch.randn(3, 128, tokens, HEADS, 64, device="cuda", dtype=torch.float16).transpose(2, 3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeats in (3, 20):
        torch.cuda._sleep(20_000_000)
        begin.record()
        for _ in range(repeats):
            F.scaled_dot_product_attention(q, k, v)
        end.record()
    torch.cuda.synchronize()
    assert found == pytest.approx(LAYERS * begin.elapsed_time(end) / 20 / 1000, rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 32])
def test_graphs_are_timed_and_give_what_calls_give(
    recipe: Callable[[str], ModuleType], model: Small, count: int
) -> None:
    clock, batch = recipe("search_clock"), pictures(count).to("cuda", torch.float16)
    model = model.to("cuda", torch.float16)
    wanted = model.features(batch)
    eager, graph = (clock.times(model, batch, None, graph=graph) for graph in (False, True))
    assert 0 < graph.attention < graph.whole  # how they compare is not asked: other tests may share the GPU
    assert 0 < eager.attention < eager.whole
    prices = recipe("search_prices")
    for kind, pattern in ((prices.FINER, TopK(share=0.5, score="pooled", parts=8)), ("band", Band(share=0.2))):
        plan = prices.single_plan(kind, pattern, 2)
        with pytest.raises(ValueError, match="dense: wanted the times of the dense model, from which a plan's"):
            clock.times(model, batch, plan)
        sparse = clock.times(model, batch, plan, graph, graph=True)
        assert sparse.whole > 0
        assert sparse.besides == pytest.approx(graph.besides)
        with visparse.sparsify(model.backbone, plan, strict=True):
            given = model.features(batch)
            with clock.captured(lambda: model.features(batch), batch.device) as replay:
                replay()
            assert torch.equal(model.features(batch), given)  # the plan works on after the graph is gone
    assert session_of(model.backbone) is None
    assert torch.equal(model.features(batch), wanted)
