import pytest
import torch
from torch import nn

from visparse.measure import timing
from visparse.measure.timing import StepClock


@pytest.fixture
def now(monkeypatch):
    """A clock that only moves when told to."""
    state = {"now": 100.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: state["now"])

    def wait(seconds: float) -> None:
        state["now"] += seconds

    return wait


def test_parts_of_a_run(now):
    model, ticks = nn.Identity(), []
    latents = torch.ones(2)
    with StepClock([model], torch.device("cpu"), lambda: ticks.append(1)) as clock:
        now(1.0)
        for seconds in (3.0, 2.0):
            model(latents)
            now(seconds)
            model(latents)
            assert clock.on_step_end(None, 0, None, {"latents": latents}) == {}
        now(0.5)
    now(9.0)
    assert (clock.steps, len(ticks)) == (2, 2)
    assert (clock.seconds_text, clock.seconds_denoise, clock.seconds_decode, clock.seconds) == (1.0, 5.0, 0.5, 6.5)
    assert torch.equal(clock.latents, latents)
    assert not model._forward_pre_hooks


def test_a_run_without_steps_is_an_error():
    with StepClock([nn.Identity()], torch.device("cpu")) as clock:
        pass
    with pytest.raises(RuntimeError, match="no denoiser step was seen"):
        _ = clock.seconds_denoise


def test_hooks_go_when_the_run_fails():
    model = nn.Identity()
    with pytest.raises(KeyError), StepClock([model], torch.device("cpu")):
        raise KeyError
    assert not model._forward_pre_hooks
