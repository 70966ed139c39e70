"""The first look of a search, and its clocks: what is timed, with which run, and what is not."""

import time
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from visparse.head_search.candidates import make_candidates
from visparse.head_search.costs import make_costs
from visparse.head_search.probe import Bench, probe
from visparse.head_search.searcher import Searcher
from visparse.head_search.settings import SearchSettings
from visparse.head_search.spans import Spans
from visparse.layout import Layout
from visparse.session import session_of

SIDE = 160  # pixels: 10 x 10 patches
COLD = 0.3  # seconds of a first call that sets something up, beside a few milliseconds of work


def make(**more):
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **shape, **more).eval().requires_grad_(False)


@pytest.fixture
def vit():
    return make()


@pytest.fixture
def calls(vit):
    """Batches of the model's calls."""
    seen = []
    vit.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["x"])), with_kwargs=True)
    return seen


def run(batch=1, steps=1, side=SIDE):
    return [{"x": torch.randn(batch, 3, side, side)} for _ in range(steps)]


def search(vit, *, inputs=None, work=None, **more):
    fast = {"rows": 1, "probe": False, "rates": "h200", "family": "plain"}
    settings = SearchSettings(attention=0.5, dense_steps=0, work=work, **fast)
    return Searcher(vit, settings, inputs=[run()] if inputs is None else inputs, **more)


class SlowFirst(TorchFunctionMode):
    """The first call of a function takes `COLD` longer."""

    def __init__(self, slow):
        super().__init__()
        self.slow, self.calls = slow, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is self.slow:
            self.calls += 1
            time.sleep(COLD if self.calls == 1 else 0)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("slow", "calls"), [(F.scaled_dot_product_attention, 4), (F.conv2d, 2)])
def test_the_first_call_of_a_model_is_not_timed(vit, slow, calls):
    searcher = search(vit)
    with SlowFirst(slow) as mode:
        ready = searcher.prepare()
    facts = searcher.work.facts
    assert mode.calls == calls
    assert 0 < ready.step_seconds < COLD
    assert 0 < facts["dense_milliseconds"] * 2 * 2 < 1000 * ready.step_seconds
    assert facts["share"] == pytest.approx(facts["dense_milliseconds"] * 2 * 2 / 1000 / facts["step_seconds"])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_two_calls_are_enough(vit, calls, steps):
    search(vit, inputs=[run(1, steps)]).prepare()
    assert calls == [1, 1]


def test_times_are_those_of_the_timed_run_and_scores_of_inputs(vit, calls, tmp_path):
    work, timed = tmp_path / "w.jsonl", run(3)
    searcher = search(vit, inputs=[run(2), run(1)], timed=timed, work=work)
    ready = searcher.prepare()
    assert calls == [3, 3]
    assert searcher.work.facts["batch"] == 3
    searcher.score(ready)
    assert calls == [3, 3, 2, 1]
    assert {(key[0], key[3]) for key in searcher.work.scores} == {(0, 0), (0, 1), (1, 0)}
    calls.clear()
    searcher._few_steps()
    assert calls == [3] * 4
    calls.clear()
    again = search(vit, inputs=[run(2), run(1)], timed=timed, work=work)
    assert again.prepare().step_seconds == ready.step_seconds
    assert calls == []
    with pytest.raises(ValueError, match=r"a search with timed=\[\{'x': \[3, 3, 160, 160\]\}\], this one has"):
        search(vit, inputs=[run(2), run(1)], timed=run(4), work=work)
    with pytest.raises(ValueError, match=r"belongs to a search with timed=\[\{'x': .*this one has None"):
        search(vit, inputs=[run(2), run(1)], work=work)


def test_what_a_search_will_take_goes_by_the_runs_that_are_scored(vit):
    long = search(vit, inputs=[run()] * 1000, timed=run(4))
    own = long.outlook()
    long.work.facts["step_seconds"] += 4.0  # a call of 4 pictures takes so much longer
    longer = long.outlook()
    assert longer.seconds - own.seconds == pytest.approx(1000, abs=200)


def test_timed_runs_that_fit_no_inputs(vit):
    with pytest.raises(ValueError, match=r"timed: wanted a run of as many steps as those of inputs, 1, got 2;"):
        search(vit, timed=run(1, 2))
    searcher = search(make(dynamic_img_size=True), timed=run(1, 1, 128))
    ready = searcher.prepare()
    assert ready.layout.grid == (1, 8, 8)
    with pytest.raises(ValueError, match=r"timed: wanted a run on the grid of inputs, .*10, 10.*, got .*8, 8.*;"):
        searcher.score(ready)
    assert session_of(searcher.target) is None


def test_a_timer_says_what_a_call_takes(vit):
    layout = Layout((1, 10, 10), before=1)
    candidates = make_candidates(layout, ("plain",))
    costs = make_costs(candidates.kept, layout, 32, "h200")
    at = {one.pattern: cost for one, cost in zip(candidates.kept, costs.milliseconds, strict=True)}
    layers, heads, batch, besides = 2, 2, 3, 0.004
    timed = []

    def timer():
        session = session_of(vit)
        timed.append(session is not None)
        if session is None:
            return besides + 0.006
        pattern = session.router.plan.patterns["all"].resolve(layout.grid)
        return besides + layers * batch * (0.1 + 2.0 * heads * at[pattern]) / 1000

    bench = Bench(vit, lambda: pytest.fail("the timer does it"), layers, heads, batch, 0.006, timer)
    line = probe(bench, candidates, costs, torch.device("cpu"))["plain"]
    assert timed == [False, True, True]
    assert (line.call, line.factor) == (pytest.approx(0.1, rel=1e-3), pytest.approx(2.0, rel=1e-3))
    assert session_of(vit) is None


def test_spans_on_a_cpu():
    spans = Spans()
    assert spans.time(lambda: time.sleep(0.02) or 7, torch.device("cpu")) == 7
    time.sleep(0.05)
    spans.time(lambda: None, torch.device("cpu"))
    assert spans.calls == 2
    assert 0.02 <= spans.seconds < 0.05


def test_spans_on_an_accelerator_wait_only_when_they_are_read(monkeypatch):
    happened, queue = [], [0.0]

    class Event:
        def __init__(self, device, enable_timing):
            assert (device, enable_timing) == (torch.device("cuda", 1), True)

        def record(self, stream):
            self.at = queue[0]
            happened.append(f"event on {stream}")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, other):
            return other.at - self.at

    def work():
        happened.append("work")
        queue[0] += 3.0  # milliseconds on the device

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(current_stream=lambda device: f"stream {device.index}"))
    spans = Spans()
    for _ in range(2):
        spans.time(work, torch.device("cuda", 1))
        queue[0] += 50.0  # of other work
    assert happened == ["event on stream 1", "work", "event on stream 1"] * 2
    assert spans.seconds == pytest.approx(0.006)
    assert spans.seconds == pytest.approx(0.006)
    assert happened[6:] == ["wait", "wait"]


@pytest.mark.gpu
def test_spans_on_a_gpu_are_the_time_of_its_work():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda._sleep(10**5)  # the first launch loads the kernel
    spans, begin, end = Spans(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10**7)  # time to queue the rest
    begin.record()
    for cycles in (10**7, 2 * 10**7):
        spans.time(lambda cycles=cycles: torch.cuda._sleep(cycles), device)
    end.record()
    assert spans.seconds == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.02)
    assert spans.calls == 2
