"""What compensated plans keep during runs of pipelines is freed, and nothing piles up."""

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch.fx.experimental.symbolic_shapes import has_symbolic_sizes_strides

import visparse
from visparse.compensation.serve import Compensation

BLOCKS = {"block_q": 64, "block_k": 32, "strict": True}


def tensors() -> tuple[int, int]:
    """Number and bytes of all tensors that are alive; those that torch.compile traces with have no bytes."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    alive = [x for x in alive if not has_symbolic_sizes_strides(x)]
    return len(alive), sum(x.nbytes for x in alive)


def test_fifty_runs_leave_no_memory(wan, movie, plan, sparse, serving, at_step):
    sparse(wan, plan)
    seen: list[Any] = []

    def look(pipe: Any) -> None:
        seen.append(
            (visparse.report(pipe).models[0].state_bytes, weakref.ref(next(iter(serving(pipe).states.values()))))
        )

    settings: dict[str, Any] = {"guidance": 3.0, "num_inference_steps": 4, "height": 64, "num_frames": 5}
    movie(wan, **settings, callback_on_step_end=at_step(2, look))
    assert seen[0][0] > 0
    before = tensors()
    for _ in range(49):
        movie(wan, **settings)
    assert tensors() == before
    assert seen[0][1]() is None
    assert visparse.report(wan).models[0].state_bytes == 0
    visparse.restore(wan)
    assert tensors()[1] < before[1]


@pytest.mark.parametrize("schedule", [{"last": 1}, {"every": 3}, {}], ids=str)
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_states_are_freed_with_the_last_call(wan, movie, monkeypatch, kind, schedule, sparse, serving):
    """Not only when the pipeline ends, since its decoder comes before that."""
    wan.scheduler = kind()
    sparse(wan, dense_steps={"first": 2} | schedule)
    monkeypatch.setattr(Compensation, "rest", lambda self, step: None)
    movie(wan, guidance=3.0)
    assert not serving(wan).states


def test_restore_in_a_run_frees_at_once(wan, movie, sparse, serving, at_step):
    sparse(wan)
    states: list[Any] = []

    def restore(pipe: Any) -> None:
        states.extend(weakref.ref(state) for state in serving(pipe).states.values())
        visparse.restore(pipe)
        gc.collect()
        states.append(sum(state() is not None for state in states))

    assert movie(wan, callback_on_step_end=at_step(2, restore)).isfinite().all()
    assert len(states) == 4
    assert states[-1] == 0


def test_many_sizes_leave_no_memory(wan, movie, sparse, serving):
    sparse(wan)
    for frames in range(4, 16):
        movie(wan, height=64, width=32, num_frames=1 + 4 * (frames - 1), num_inference_steps=2)
    kept = serving(wan)
    assert not kept.states
    assert len(kept._checked) <= 8


def test_a_model_without_steps_keeps_nothing(wan_transformer):
    settings = {"share": 0.3, "score": "pooled", "refresh": None, "residual": None, "dense_steps": 0}
    visparse.sparsify(wan_transformer, "foveal", **settings, **BLOCKS)
    with torch.no_grad():
        for _ in range(3):
            wan_transformer(torch.randn(1, 16, 4, 16, 12), torch.tensor([900]), torch.randn(1, 4, 32))
    assert not wan_transformer._visparse.router.compensation.states
    assert visparse.report(wan_transformer).models[0].layers[0].sparse_calls == 3


def test_going_over_to_the_other_transformer_frees_the_first(make_wan, wan_transformer, movie, sparse):
    pipe = make_wan(transformer_2=wan_transformer, boundary_ratio=0.6)
    sparse(pipe)
    held: list[tuple[int, int]] = []

    def count(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        sessions = [model._visparse.router for model in (pipe.transformer, pipe.transformer_2)]
        held.append(tuple(len(router.compensation.states) for router in sessions))
        return {}

    first = movie(pipe, num_inference_steps=10, callback_on_step_end=count)
    assert (3, 0) in held
    assert (0, 3) in held
    assert (3, 3) not in held[-2:]
    assert held[-1] == (0, 0)
    assert torch.equal(movie(pipe, num_inference_steps=10), first)
