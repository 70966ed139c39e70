"""The clock with real schedulers: every call of a denoiser gets the right step, of the right number of steps."""

import copy
import math
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visparse.plan import SparsePlan
from visparse.schedule import DenseSteps
from visparse.steps import Clock, SchedulerSteps
from visparse.timesteps import Timesteps

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__:DeprecationWarning", "ignore:__array__:DeprecationWarning"
)

ONCE = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "CogVideoXDPMScheduler",
    "LCMScheduler",
    "EDMEulerScheduler",
]
TWICE = [
    "HeunDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


class Pipe:
    """What a clock sees of a pipeline."""

    def __init__(self, name, **config):
        self.scheduler = getattr(diffusers, name)(**config)


def denoise(clock, pipe, steps, *, begin=0, passes=1, context=False, stop=None, form=lambda t: t):
    """Call a denoiser as a pipeline would; returns (step, total, sigma) of each call."""
    scheduler = pipe.scheduler
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        scheduler.set_timesteps(steps, mu=1.0)
    else:
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[begin:]
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    sample, seen = torch.zeros(1, 4, 2, 2), []
    for i, t in enumerate(timesteps[:stop]):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        for branch in ("cond", "uncond")[:passes]:
            told = SimpleNamespace(name=branch, step_index=i, num_inference_steps=len(timesteps))
            clock.enter(told if context else None)
            clock.tick(form(t))
            clock.enter(None)
            seen.append((clock.step, clock.total, clock.sigma))
        if type(scheduler).__name__ != "CogVideoXDPMScheduler":  # wants two predictions; it has no index to advance
            scheduler.step(torch.zeros_like(sample), t, sample)
    return seen


def clock_of(pipe):
    return Clock(lambda step, total, sigmas: step, SchedulerSteps(pipe))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("name", ONCE)
def test_one_call_a_step(name, steps, passes, context):
    pipe = Pipe(name)
    clock = clock_of(pipe)
    for run in (1, 2):
        seen = denoise(clock, pipe, steps, passes=passes, context=context)
        assert [(step, total) for step, total, _ in seen] == [(i, steps) for i in range(steps) for _ in range(passes)]
        assert clock.runs == run
        levels = getattr(pipe.scheduler, "sigmas", None)
        wanted = [None] * steps if levels is None else levels[:steps].tolist()
        assert [sigma for *_, sigma in seen] == [level for level in wanted for _ in range(passes)]


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("steps", [2, 4, 50])
@pytest.mark.parametrize("name", TWICE)
def test_two_calls_a_step(name, steps, passes, context):
    pipe = Pipe(name)
    clock = clock_of(pipe)
    for run in (1, 2):
        seen = denoise(clock, pipe, steps, passes=passes, context=context)
        assert len(seen) == (2 * steps - 1) * passes
        assert {total for _, total, _ in seen} == {steps}
        ordered = [step for step, *_ in seen]
        assert ordered == sorted(ordered)
        assert set(ordered) == set(range(steps))
        assert clock.runs == run
        plan = SparsePlan(name="half", patterns={"a": {"name": "skip"}}, default="a", dense_steps=0.5)
        dense = sum(plan.stage(step, total) < 0 for step, total, _ in seen) / len(seen)
        assert abs(dense - 0.5) <= 1 / steps


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", ONCE)
def test_images_from_images_begin_behind_the_first_timestep(name, context):
    pipe = Pipe(name)
    seen = denoise(clock_of(pipe), pipe, 20, begin=8, context=context)
    assert [(step, total) for step, total, _ in seen] == [(i, 12) for i in range(12)]
    levels = getattr(pipe.scheduler, "sigmas", None)
    assert [sigma for *_, sigma in seen] == ([None] * 12 if levels is None else levels[8:20].tolist())


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", TWICE)
def test_images_from_images_with_two_calls_a_step(name, context):
    pipe = Pipe(name)
    seen = denoise(clock_of(pipe), pipe, 20, begin=16, context=context)
    assert {total for _, total, _ in seen} == {12}
    assert (seen[0][0], seen[-1][0]) == (0, 11)


def test_pndm_with_its_repeated_timestep():
    pipe = Pipe("PNDMScheduler", skip_prk_steps=True)
    seen = denoise(clock_of(pipe), pipe, 8)
    assert len(seen) == 9
    assert [step for step, *_ in seen] == [0, 1, 1, 2, 3, 4, 5, 6, 7]
    assert {total for _, total, _ in seen} == {8}


@pytest.mark.parametrize("context", [False, True])
def test_an_interrupted_run_and_the_next_one(context):
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    clock = clock_of(pipe)
    for run, stop in enumerate((1, 1, 3, 6), start=1):
        seen = denoise(clock, pipe, 6, stop=stop, context=context)
        assert [(step, total) for step, total, _ in seen] == [(i, 6) for i in range(stop)]
        assert clock.runs == run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divide", [1, 1000])
def test_timesteps_that_are_divided_or_rounded(divide, dtype):
    """In bfloat16 the first timesteps of a shifted schedule are equal; the scheduler's own count tells them apart."""
    pipe = Pipe("FlowMatchEulerDiscreteScheduler", shift=7.0)
    seen = denoise(clock_of(pipe), pipe, 50, form=lambda t: (t.expand(2) / divide).to(dtype), passes=2)
    assert [step for step, *_ in seen] == [i for i in range(50) for _ in range(2)]
    rounded = [(t / divide).to(dtype).item() for t in pipe.scheduler.timesteps]
    assert (len(set(rounded)) < 50) == (dtype is torch.bfloat16)


def test_a_scheduler_that_is_not_stepped():
    """Pipelines that step copies of their scheduler: the timesteps alone tell."""
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    pipe.scheduler.set_timesteps(10)
    pipe.scheduler.set_begin_index(0)
    clock = clock_of(pipe)
    seen = []
    for t in pipe.scheduler.timesteps:
        clock.tick(t)
        seen.append((clock.step, clock.total))
    assert seen == [(i, 10) for i in range(10)]


def test_a_step_whose_denoiser_was_skipped():
    pipe = Pipe("DDIMScheduler")
    pipe.scheduler.set_timesteps(10)
    clock = clock_of(pipe)
    seen = []
    for i in (0, 1, 4, 5, 9):
        clock.tick(pipe.scheduler.timesteps[i])
        seen.append(clock.step)
    assert seen == [0, 1, 4, 5, 9]


def test_timesteps_of_another_scheduler_are_counted():
    """A loop of the user's own on the denoiser of a pipeline: its scheduler is not asked, but the total never lies."""
    pipe = Pipe("DDIMScheduler")
    pipe.scheduler.set_timesteps(3)
    clock = clock_of(pipe)
    seen = []
    for t in (777, 600, 600, 500, 321, 50):
        clock.tick(t)
        seen.append((clock.step, clock.total))
    assert seen == [(0, 3), (1, 3), (1, 3), (2, 3), (3, 4), (4, 5)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ONCE + TWICE), st.integers(2, 30), st.booleans(), st.data())
def test_the_step_is_below_the_total(name, steps, context, data):
    pipe = Pipe(name)
    order = pipe.scheduler.order
    begin = order * data.draw(st.integers(0, steps - 1))
    clock = clock_of(pipe)
    seen = denoise(clock, pipe, steps, begin=begin, context=context)
    assert seen
    assert all(0 <= step < total for step, total, _ in seen)
    assert seen[-1][0] == seen[-1][1] - 1
    assert clock.runs == 1


def test_noise_levels_reach_the_plan():
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    plan = SparsePlan(name="s", patterns={"a": {"name": "skip"}}, default="a", dense_steps=DenseSteps(sigma_above=0.7))
    clock = Clock(plan.stage, SchedulerSteps(pipe))
    denoise(clock, pipe, 10)
    assert clock.sigmas == pytest.approx([1 - 0.999 / 9 * i for i in range(10)], abs=1e-3)
    assert [plan.stage(step, 10, clock.sigmas) for step in range(10)] == [-1] * 3 + [3] * 7


@pytest.mark.parametrize("context", [False, True])
def test_no_noise_levels(context):
    plan = SparsePlan(name="s", patterns={"a": {"name": "skip"}}, default="a", dense_steps=DenseSteps(sigma_above=0.7))
    pipe = Pipe("DDIMScheduler")
    clock = Clock(plan.stage, SchedulerSteps(pipe))
    text = r"sigma_above=0.7 needs the noise level.*use 'first', a number of steps \(DDIMScheduler has no sigmas\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            denoise(clock, pipe, 4, context=context)
    with pytest.raises(ValueError, match=r"a bare model has no sigmas"):
        Clock(plan.stage).tick(999)
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler has other timesteps than the denoiser gets"):
        Clock(plan.stage, SchedulerSteps(pipe)).tick(444)


def test_timesteps_are_read_once_for_each_setting():
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    steps = SchedulerSteps(pipe)
    assert steps.timesteps() is None
    pipe.scheduler.set_timesteps(4)
    first = steps.timesteps()
    assert isinstance(first, Timesteps)
    assert steps.timesteps() is first
    pipe.scheduler.set_timesteps(4)
    assert steps.timesteps() is not first
    assert math.isclose(first.largest, 1000)


def test_a_clock_that_has_run_can_be_copied_and_pickled():
    pipe = Pipe("FlowMatchEulerDiscreteScheduler")
    plan = SparsePlan(name="s", patterns={"a": {"name": "skip"}}, default="a", dense_steps=1)
    clock = Clock(plan.stage, SchedulerSteps(pipe))
    denoise(clock, pipe, 3, stop=2)
    for twin in (copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
        twin.tick(500)
        assert (twin.step, twin.total, twin.runs) == (0, None, 2)
    assert (clock.step, clock.total, clock.runs) == (1, 3, 1)
