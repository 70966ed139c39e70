"""Layers that are dense as a whole: against every choice there is, and in plans of a budget."""

import itertools
import random

import pytest

from visparse.compensation import Proxies
from visparse.head_search.allocate import Option, allocate
from visparse.head_search.allocate_layers import Layer, allocate_layers, cheapest_layers
from visparse.head_search.candidates import Candidate, Candidates
from visparse.head_search.choose import Table
from visparse.head_search.costs import Costs
from visparse.head_search.schedule import make_schedule
from visparse.patterns import Dense, Neighborhood, Skip


def random_layers(seed, layers=3, heads=2, call=0.2):
    """Each head: some sparse options and a dense one, which costs 1.3 alone and 1 with all heads of its layer."""
    draw = random.Random(seed)
    found = []
    for _ in range(layers):
        scale = 10 ** draw.uniform(-2, 1)
        options = [
            [*(Option(draw.uniform(0, 1.2), scale * draw.random() ** 2) for _ in range(3)), Option(1.3, 0.0)]
            for _ in range(heads)
        ]
        found.append(Layer(heads=options, call=call, place=3, dense=Option(float(heads), 0.0)))
    return found


def every_choice(layers):
    """(cost, error) of all choices there are."""
    found = [(0.0, 0.0)]
    for layer in layers:
        own = [
            (layer.call + sum(one.cost for one in picked), sum(one.error for one in picked))
            for picked in itertools.product(*layer.heads)
        ]
        own.append((layer.dense.cost, layer.dense.error))
        found = [(a + c, b + d) for a, b in found for c, d in own]
    return found


def paid(layers, picks):
    """Cost and error of picks, dense layers at their own price."""
    cost = error = 0.0
    picks = iter(picks)
    for layer in layers:
        own = [next(picks) for _ in layer.heads]
        if all(pick == layer.place for pick in own):
            cost, error = cost + layer.dense.cost, error + layer.dense.error
        else:
            chosen = [options[pick] for options, pick in zip(layer.heads, own, strict=True)]
            cost += layer.call + sum(one.cost for one in chosen)
            error += sum(one.error for one in chosen)
    return cost, error


@pytest.mark.parametrize("seed", range(25))
def test_bound_and_choice_enclose_the_best(seed):
    layers = random_layers(seed)
    choices = every_choice(layers)
    least = min(cost for cost, _ in choices)
    heads = [options for layer in layers for options in layer.heads]
    for budget in (least * 1.01, least + 1.0, least + 2.5, 6.0, 100.0):
        found = allocate_layers(layers, budget)
        best = min(error for cost, error in choices if cost <= budget + 1e-9)
        assert (found.cost, found.error) == pytest.approx(paid(layers, found.picks))
        assert found.cost <= budget * (1 + 1e-6)
        assert found.bound <= best * (1 + 1e-9) + 1e-12
        assert found.error >= best * (1 - 1e-9) - 1e-12
        # never worse than heads that know of no dense layers
        assert found.error <= allocate(heads, budget - sum(one.call for one in layers)).error + 1e-12
    assert allocate_layers(layers, 6.0).error == 0.0  # three dense layers; their heads would cost 7.8 one by one
    wish = min(error for cost, error in choices if cost <= least + 2.0) + 1e-6
    cheap = cheapest_layers(layers, wish)
    assert cheap.error <= wish * (1 + 1e-6)
    assert (cheap.cost, cheap.error) == pytest.approx(paid(layers, cheap.picks))
    assert cheap.cost <= min(cost for cost, error in choices if error <= wish) + 1.5


def test_what_a_dense_layer_frees_is_spent_again():
    head = [Option(0.1, 1.0), Option(0.9, 0.5), Option(1.3, 0.0)]
    other = [Option(0.1, 0.3), Option(0.5, 0.1), Option(1.3, 0.0)]
    layers = [Layer(heads=[own] * 2, call=0.2, place=2, dense=Option(2.0, 0.0)) for own in (head, other)]
    found = allocate_layers(layers, 3.2)
    assert found.picks == (2, 2, 1, 1)  # by its heads the first layer would cost 2.8
    assert (found.cost, found.error) == (pytest.approx(3.2), pytest.approx(0.2))
    assert cheapest_layers(layers, 0.2).picks == found.picks
    with pytest.raises(ValueError, match=r"budget: wanted at least 0.8, what the cheapest candidates cost, got 0.7"):
        allocate_layers(layers, 0.7)


def test_without_a_dense_option_heads_are_allocated_alone():
    head = [Option(0.0, 1.0), Option(1.0, 0.2)]
    layers = [Layer(heads=[head] * 2), Layer(heads=[head])]
    assert allocate_layers(layers, 2.0).cost == 2.0
    assert sorted(allocate_layers(layers, 2.0).picks) == [0, 1, 1]
    assert cheapest_layers(layers, 1.4).cost == 2.0


def test_a_plan_pays_for_dense_layers_what_they_take():
    near, heads, layers = Neighborhood(window=(1, 3, 3)), 2, 2
    kept = tuple(
        Candidate(*one) for one in (("dense", "plain", Dense()), ("skip", "plain", Skip()), ("near", "plain", near))
    )
    costs = Costs(
        device="cpu",
        source="rates",
        dense=1.0,
        milliseconds=(1.3, 0.0, 0.2),
        block_density=(1.0, 0.0, 0.2),
        call={"plain": 0.1},
    )
    scores = {
        (0, 2, "a", 0, layer): {"error": [[0.0] * heads, [1.0] * heads, [size] * heads], "mse": [[0.0] * heads] * 3}
        for layer, size in ((0, 0.9), (1, 0.01))
    }
    schedules = {"plain": make_schedule("plain", 4, 1, None)}
    table = Table(scores, Candidates(kept=kept, left_out={}, proxies=Proxies()), costs, schedules)
    found = table.by_budget("plain", layers, attention=2.5 / 4)  # 2 for a dense layer, 0.5 for one of windows
    assert [found.picks[0, layer, 0].name for layer in (0, 1)] == ["dense", "near"]
    assert found.milliseconds == pytest.approx(2.5)
    assert found.gap is not None
    by_blocks = table.by_budget("plain", layers, density=0.6)
    assert [by_blocks.picks[0, layer, 0].name for layer in (0, 1)] == ["dense", "near"]
    assert by_blocks.block_density == pytest.approx(0.6)
    assert table.parts_of_error(found, {(0, 0): 5.0, (0, 1): 3.0}) == {(0, 0): 0.0, (0, 1): pytest.approx(0.06)}
