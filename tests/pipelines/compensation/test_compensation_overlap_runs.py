"""Refresh by overlap in whole runs: steps that the run itself measures again, and what report says of them."""

import json

import pytest
import torch

import visparse

ALWAYS, NEVER = visparse.Overlap(below=1.0), visparse.Overlap(below=0.01)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_says_what_it_found_and_did(wan, movie, guidance, sparse):
    sparse(wan, refresh=ALWAYS)
    movie(wan, guidance=guidance, num_inference_steps=8)
    model = visparse.report(wan).models[0]
    assert 0 < len(model.refreshed_at) <= 3
    assert model.refreshed_at == tuple(step + 1 for step, found in model.overlaps.items() if found < 1)
    assert set(model.overlaps) == set(range(2, 7)) - set(model.refreshed_at) - {6}
    measured = (1 + len(model.refreshed_at)) * (1 + (guidance > 1))
    assert {layer.measured_calls for layer in model.layers} == {measured}
    least = min(model.overlaps, key=model.overlaps.get)
    text = f"overlap looked at in {len(model.overlaps)} steps, least {model.overlaps[least]:.0%} in step {least}"
    assert f"{text}; measured again at {', '.join(map(str, model.refreshed_at))}" in str(visparse.report(wan))
    data = json.loads(json.dumps(visparse.report(wan).to_dict()))["models"][0]
    assert data["refreshed_at"] == list(model.refreshed_at)
    assert visparse.report(wan, grid=(4, 8, 6)).models[0].overlaps == {}


def test_a_choice_that_holds_is_kept(wan, movie, sparse):
    sparse(wan, refresh=NEVER)
    out = movie(wan)
    model = visparse.report(wan).models[0]
    assert (model.refreshed_at, list(model.overlaps)) == ((), [2, 3])
    assert "none measured again" in str(visparse.report(wan))
    sparse(wan, refresh=None)
    assert torch.equal(movie(wan), out)  # looking changes nothing
    assert visparse.report(wan).models[0].overlaps == {}


def test_two_denoisers_look_at_their_own_choices(make_wan, wan_transformer, movie, reuses, sparse):
    pipe = make_wan(transformer_2=wan_transformer, boundary_ratio=0.5)
    sparse(pipe, refresh=ALWAYS)
    first = movie(pipe, num_inference_steps=12)
    high, low = visparse.report(pipe).models
    assert high.overlaps
    assert low.overlaps
    assert max(high.overlaps) < min(low.overlaps)
    assert set(high.refreshed_at).isdisjoint(low.refreshed_at)
    assert torch.equal(movie(pipe, num_inference_steps=12), first)
    assert reuses
