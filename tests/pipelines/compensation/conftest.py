"""Compensated plans on tiny random pipelines: what all their tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import visparse
from visparse.compensation.serve import Compensation

BLOCKS = {"block_q": 64, "block_k": 32, "strict": True}
SIZE = {"height": 128, "num_inference_steps": 6}  # a grid of 4 x 8 x 6: 3 tiles of queries, 6 of keys
NEAR = {"window": (2, 3, 3), "stride": 1, "dense_steps": 2, "statistics": {"refresh": 4}, "residual": {"refresh": 3}}
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "foveal": ("foveal", {}),
    "foveal by overlap": ("foveal", {"refresh": visparse.Overlap(below=1.0)}),
    "re-ttention": ("re-ttention", {}),
    "neighborhood": ("neighborhood", NEAR),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    """Name of a plan that measures and reuses."""
    return str(request.param)


@pytest.fixture
def sparse() -> Callable[..., Any]:
    """Makes a target sparse, by one of the plans above, with small tiles."""

    def call(target: Any, plan: str = "foveal", **changes: Any) -> Any:
        name, settings = PLANS[plan]
        return visparse.sparsify(target, name, **{**settings, **BLOCKS, **changes})

    return call


@pytest.fixture
def serving() -> Callable[..., Any]:
    """What serves the layers of a pipeline."""

    def call(pipe: Any) -> Compensation:
        found: Compensation = pipe.transformer._visparse.router.compensation
        return found

    return call


@pytest.fixture
def layers() -> Callable[..., Any]:
    """The layers in the report of a target."""

    def call(target: Any) -> Any:
        return visparse.report(target).models[0].layers

    return call


@pytest.fixture
def untouched() -> Callable[..., Any]:
    """Whether a Wan transformer is as it was made."""

    def call(model: Any) -> bool:
        return all(type(block.attn1.processor) is WanAttnProcessor for block in model.blocks) and not hasattr(
            model, "_visparse"
        )

    return call


@pytest.fixture
def at_step() -> Callable[..., Any]:
    """A callback of pipelines that does something at one step."""

    def call(step: int, do: Callable[[Any], object]) -> Callable[..., dict[str, Any]]:
        def step_end(pipe: Any, now: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
            if now == step:
                do(pipe)
            return {}

        return step_end

    return call


@pytest.fixture
def movie(film: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Runs a Wan pipeline; by default a grid of 4 x 8 x 6, in 6 steps."""
    return lambda pipe, **settings: film(pipe, **{**SIZE, **settings})


@pytest.fixture
def fresh(
    make_wan: Callable[..., Any], movie: Callable[..., torch.Tensor], sparse: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    """The result of a pipeline that has never run before."""

    def run(plan: str = "foveal", **settings: Any) -> torch.Tensor:
        pipe = make_wan()
        sparse(pipe, plan)
        return movie(pipe, **settings)

    return run


@pytest.fixture
def reuses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Checks each use of what was measured: (step of the measurement, step of the use) of each.

    It must be of the same run, of the step that the plan wants or a later one, and not of a step before a refresh; the
    overlap refreshes at the step after the one where it has fallen.
    """
    measured: dict[tuple[int, str], tuple[int, int]] = {}
    used: list[tuple[int, int]] = []
    measure, reuse = Compensation._measure, Compensation._sparse

    def measuring(self: Compensation, call: Any, layout: Any, names: Any, patterns: Any, state: Any, *rest: Any) -> Any:
        before = dict(state.measured)
        out = measure(self, call, layout, names, patterns, state, *rest)
        for what, wanted in state.measured.items():
            if before.get(what) != wanted:
                measured[id(state), what] = self.router.clock.runs, self.router.clock.step or 0
        return out

    def reusing(self: Compensation, call: Any, layout: Any, names: Any, patterns: Any, state: Any, step: int) -> Any:
        plan, clock = self.router.plan, self.router.clock
        assert set(state.measured) == set(plan.refreshes)
        for what, wanted in state.measured.items():
            scheduled = plan.measured_at(what, step, clock.total, clock.sigmas)
            watch = self.watch if isinstance(plan.refreshes[what], visparse.Overlap) else None
            assert wanted == max([scheduled, *(watch.refreshed if watch is not None else [])])
            run, when = measured[id(state), what]
            assert run == clock.runs
            assert wanted <= when < step or (wanted <= when and clock.scheduler.timesteps().steps.count(step) > 1)
            used.append((when, step))
        return reuse(self, call, layout, names, patterns, state, step)

    monkeypatch.setattr(Compensation, "_measure", measuring)
    monkeypatch.setattr(Compensation, "_sparse", reusing)
    return used
