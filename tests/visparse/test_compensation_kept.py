"""What a layer keeps between the steps of a run, under a plan that reuses what it measured: nothing stale is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from visparse.compensation.testing import NEAR, Run, is_dense
from visparse.layout import Layout
from visparse.patterns import Neighborhood, TopK

REUSED: dict[str, Any] = {
    "patterns": {"mass": TopK(share=0.2, sample=1)},
    "default": "mass",
    "proxies": {},
    "residual": {"storage": "full"},
}


def test_a_run_keeps_nothing_of_the_one_before() -> None:
    run = Run(**REUSED)
    first = [run.call(step, seed=step)[0] for step in range(6)]
    assert not run.serving.states  # freed with the last step
    for _ in range(5):
        assert all(torch.equal(run.call(step, seed=step)[0], first[step]) for step in range(6))


def test_an_interrupted_run_leaves_nothing() -> None:
    run = Run(**REUSED)
    wanted = [run.call(step, seed=step)[0] for step in range(6)]
    for step in range(4):
        run.call(step, seed=100 + step)
    assert run.serving.states
    for step in range(6):
        assert torch.equal(run.call(step, seed=step)[0], wanted[step])


def test_branches_do_not_mix() -> None:
    run = Run(**REUSED)
    outs = {}
    for step in range(3):
        for branch, seed in (("cond", step), ("uncond", 50 + step)):
            outs[branch], _ = run.call(step, seed=seed, branch=branch)
    for branch, start in (("cond", 0), ("uncond", 50)):
        alone = Run(**REUSED)
        for step in range(3):
            out, _ = alone.call(step, seed=start + step, branch=branch)
        assert torch.equal(out, outs[branch])


def test_what_does_not_fit_is_measured_again() -> None:
    run = Run(total=9, **REUSED)
    for step in range(3):
        run.call(step, seed=step)
    other = Layout((2, 10, 12), before=5, after=3)
    assert is_dense(*run.call(3, layout=other))  # another size
    assert not is_dense(*run.call(4, layout=other, seed=9))
    assert is_dense(*run.call(5, layout=other, batch=2))  # another batch, as when guidance ends
    assert not is_dense(*run.call(6, layout=other, batch=2, seed=9))


def test_a_layer_that_a_cache_skipped_is_measured_when_it_runs() -> None:
    run = Run(total=9, **REUSED | {"residual": {"refresh": (4,), "storage": "full"}})
    assert is_dense(*run.call(0))
    assert is_dense(*run.call(3, seed=3))  # the step of the measurement was skipped
    assert is_dense(*run.call(6, seed=6))  # and so was the refresh
    assert not is_dense(*run.call(7, seed=7))


def test_a_stage_with_other_patterns_is_measured_anew() -> None:
    run = Run(
        total=9,
        patterns={"near": NEAR, "far": Neighborhood(window=(3, 7, 7))},
        assignment=[{"pattern": "far", "steps": "5:"}],
        residual={"storage": "full"},
    )
    dense_at = [step for step in range(9) if is_dense(*run.call(step, seed=step))]
    assert dense_at == [0, 1, 5]


def test_statistics_without_dense_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_steps"):
        Run(statistics={}, dense_steps=0)
