"""The front door's refusals, the step clock and the interception, without a pipeline."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visparse
from visparse.intercept import can_route, routed, routed_class
from visparse.steps import Clock, SchedulerSteps


class Processor:
    """A processor as diffusers has them: calls F.scaled_dot_product_attention of its module."""

    def __init__(self):
        self.factor = 2.0

    def __call__(self, attn, q, *, mask=None):
        return self.factor * F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Recorder:
    """A route that notes what it is asked, and can answer something else."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer, []

    def attention(self, call, dense, heads_first):
        self.calls.append((sorted(call), heads_first))
        return dense() if self.answer is None else self.answer


def test_importing_visparse_is_light():
    code = "import sys, visparse; print([m for m in ('diffusers', 'transformers', 'timm', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import visparse; print(before, 'triton' in sys.modules)"
    )
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert before == after


def test_public_names_are_few_and_real():
    assert len(visparse.__all__) <= 14
    assert all(hasattr(visparse, name) for name in visparse.__all__)


@pytest.mark.parametrize("call", [visparse.sparsify, visparse.restore, visparse.report])
def test_targets_that_are_no_denoiser(call):
    with pytest.raises(TypeError, match=r"wanted a diffusers pipeline or a denoiser .*, got int"):
        call(3)
    with pytest.raises(
        ValueError, match=r"no denoiser that visparse knows; found model: Linear; known are .*DiTTrans.*, WanTr"
    ):
        call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="found vae: Identity; known"):
        call(SimpleNamespace(components={"vae": nn.Identity(), "scheduler": object()}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"impl": "tritn"}, "impl must be one of auto, .*got 'tritn'; did you mean 'triton'"),
        ({"block_k": 48}, "block_k must be a positive multiple of 32"),
        ({"block_q": 0}, "block_q must be a positive multiple of 1"),
        ({"order": "rowmajor"}, "order must be one of auto, row-major, .*did you mean 'row-major'"),
        ({"order": [4, 8]}, r"order must be .* or a tile such as \(4, 8, 8\), got \(4, 8\)"),
        ({"strict": "yes"}, "strict must be True or False, got 'yes'"),
        ({"widnow": 3}, "unknown key 'widnow'; did you mean 'window'"),
        ({"block_qq": 64}, "unknown key 'block_qq'; did you mean 'block_q'"),
    ],
)
def test_bad_overrides(settings, text):
    with pytest.raises(ValueError, match=text):
        visparse.sparsify(nn.Linear(2, 2), "neighborhood", **settings)


def test_routed_processor_is_the_same_processor_with_another_attention():
    live, q = Processor(), torch.randn(1, 2, 5, 8)
    live.factor = 3.0
    route = Recorder()
    twin = routed(live, route)
    assert isinstance(twin, Processor)
    assert torch.equal(twin(None, q), live(None, q))
    assert route.calls == [(["attn_mask", "key", "query", "value"], True)]
    assert torch.equal(routed(live, Recorder(torch.ones(1)))(None, q), torch.tensor([3.0]))
    assert routed_class(Processor) is routed_class(Processor)
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention


def test_route_ends_with_the_call_also_when_it_raises():
    class Failing(Recorder):
        def attention(self, call, dense, heads_first):
            raise RuntimeError("stop")

    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="stop"):
        routed(Processor(), Failing())(None, q)
    outer = Recorder()
    routed(Processor(), outer)(None, q)
    Processor()(None, q)
    assert len(outer.calls) == 1


def test_routed_processor_can_be_copied_and_pickled():
    twin = routed(Processor(), Recorder())
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert type(copied) is type(twin)
        assert copied.factor == 2.0
        assert copied.visparse_route is not twin.visparse_route


def test_processors_that_cannot_be_routed():
    class Linear:
        def __call__(self, attn, q):
            return q

    class Heavy(nn.Module):
        pass

    assert can_route(Processor) is None
    assert "calls neither dispatch_attention_fn nor F.scaled_dot_product_attention" in str(can_route(Linear))
    assert "a module with weights" in str(can_route(Heavy))
    with pytest.raises(TypeError, match="cannot lead this attention through visparse: Linear"):
        routed_class(Linear)


def context(name, step=None, total=None):
    return SimpleNamespace(name=name, step_index=step, num_inference_steps=total)


def make_clock(scheduler=None):
    return Clock(lambda step, total, sigmas: step, scheduler or SchedulerSteps())


def test_clock_follows_the_cache_context():
    clock = make_clock()
    seen = []
    for step, name in [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (0, "cond"), (0, "cond")]:
        clock.enter(context(name, step, 5))
        clock.tick(torch.tensor(123))
        seen.append((clock.runs, clock.step, clock.branch))
        clock.enter(None)
    assert seen == [(1, 0, "cond"), (1, 0, "uncond"), (1, 1, "cond"), (1, 1, "uncond"), (2, 0, "cond"), (3, 0, "cond")]
    assert (clock.total, clock.source, clock.branch, clock.given) == (5, "cache context", None, False)


@pytest.mark.parametrize("give", [None, "cond", context("cond")])
def test_clock_follows_the_timestep_where_no_step_is_given(give):
    clock = make_clock()
    seen = []
    for timestep in (torch.tensor([900.0, 0.0]), 900, torch.tensor(500), 100, 900):
        clock.enter(give)
        clock.tick(timestep)
        seen.append((clock.runs, clock.step))
    assert seen == [(1, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    clock.end_run()
    clock.tick(100)
    assert (clock.runs, clock.step) == (3, 0)
    clock.tick(None)
    assert (clock.step, clock.stage) == (None, None)


def test_number_of_steps_from_the_scheduler_follows_a_copy_of_the_pipeline():
    class Pipe:
        def __init__(self):
            self.scheduler = SimpleNamespace(num_inference_steps=7)
            self.steps = SchedulerSteps(self)

    pipe = Pipe()
    twin = copy.deepcopy(pipe)
    twin.scheduler.num_inference_steps = 9
    assert (pipe.steps.total(), twin.steps.total()) == (7, 9)
    assert copy.deepcopy(pipe.steps).total() is None
    assert pickle.loads(pickle.dumps(pipe.steps)).total() is None
    steps = pipe.steps
    del pipe
    assert steps.total() is None or steps.total() == 7
