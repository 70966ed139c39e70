"""A transformer whose heads are built for one thing each: the search finds what each is for."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visparse
from visparse.adapter import ADAPTERS, Adapter
from visparse.explain import explain
from visparse.head_search.build import build_plan, write_plan
from visparse.head_search.candidates import Candidate
from visparse.head_search.schedule import make_schedule
from visparse.layout import Layout
from visparse.patterns import Skip, TopK
from visparse.plan import SparsePlan
from visparse.rules import ModelFingerprint
from visparse.session import session_of

GRID, SIZE, STEPS = (4, 16, 16), 32, 4
ROLES = (
    ("spatial", "temporal", "striped", "global", "useless"),
    ("useless", "global", "temporal", "spatial", "striped"),
)
LABELS = {
    "spatial": {"frame"},
    "temporal": {"tube8", "tube4"},
    "striped": {"stripes4"},
    "global": {"dense"},
    "useless": {"skip"},
}


class Processor:
    def __call__(self, attn, hidden_states):
        batch, tokens, _ = hidden_states.shape
        v = attn.to_v(hidden_states).view(batch, tokens, -1, SIZE).transpose(1, 2)
        q, k = (table.expand(batch, -1, -1, -1).contiguous() for table in (attn.q, attn.k))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    def __init__(self, roles):
        super().__init__()
        width, layout = len(roles) * SIZE, Layout(GRID)
        at, place = layout.coordinates(), torch.arange(layout.visual) % (GRID[1] * GRID[2])
        frames = 30.0 * F.one_hot(at[:, 0], SIZE).float()
        codes = torch.randn(GRID[1] * GRID[2], SIZE).sign()[place]
        stripes = torch.zeros(layout.visual, SIZE)
        stripes[:, 0] = 40.0 * (torch.arange(layout.visual) % 128 < 32)
        one = torch.zeros(layout.visual, SIZE)
        one[:, 0] = 1.0
        tables = {
            "spatial": (frames / 30, frames),
            "temporal": (codes, 2 * codes),
            "striped": (one, stripes),
            "global": (0 * one, one),
            "useless": (codes, codes),
        }
        self.q, self.k = (
            nn.Parameter(torch.stack([tables[role][i] for role in roles])[None], requires_grad=False) for i in (0, 1)
        )
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        seen = {"spatial": 256, "temporal": 4, "striped": 256, "global": 1024, "useless": 1}
        with torch.no_grad():  # each head but the useless one contributes as much
            for head, role in enumerate(roles):
                part = slice(head * SIZE, (head + 1) * SIZE)
                self.to_out[0].weight[:, part] *= 0.0 if role == "useless" else seen[role] ** 0.5
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class Synthetic(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=len(ROLES[0]), attention_head_dim=SIZE)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn1": Attention(roles)}) for roles in ROLES)

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = F.layer_norm(hidden_states + block["attn1"](hidden_states), hidden_states.shape[-1:])
        return hidden_states


@pytest.fixture
def model(monkeypatch):
    home = ModuleType("synthetic_adapter")
    home.ADAPTER = Adapter(
        model_class="Synthetic", attention="blocks.*.attn1", layout=lambda config, arguments: Layout(GRID)
    )
    monkeypatch.setitem(sys.modules, "synthetic_adapter", home)
    monkeypatch.setitem(ADAPTERS, "Synthetic", "synthetic_adapter")
    torch.manual_seed(0)
    return Synthetic().eval()


def make_inputs(runs=1, length=STEPS, flat=STEPS):
    """Inputs of runs; from step `flat` on all tokens are nearly the same."""
    generator = torch.Generator().manual_seed(1)
    width = len(ROLES[0]) * SIZE
    found = []
    for _ in range(runs):
        base = torch.randn(1, 1024, width, generator=generator)
        steps = [base + 0.4 * torch.randn(1, 1024, width, generator=generator) for _ in range(length)]
        for step in range(flat, length):
            steps[step] = base[:, :1] + 0.1 * steps[step]
        found.append([{"hidden_states": x, "timestep": torch.tensor(float(length - i))} for i, x in enumerate(steps)])
    return found


def test_every_head_gets_its_label(model):
    before = [block["attn1"].processor for block in model.blocks]
    # costs by rates alone: where a probe on a busy machine finds blocks dear, a whole layer is rightly dense
    plan = visparse.search(
        model, inputs=make_inputs(), max_error=0.02, family="plain", judge=2, rows=4, dense_steps=1, probe=False
    )
    for layer, roles in enumerate(ROLES):
        names = plan.names(layer, len(roles), 1)
        assert names is not None
        for role, name in zip(roles, names, strict=True):
            assert name in LABELS[role], (layer, role, name)
    assert plan.measured["predicted"]["error"] <= 0.02
    assert [block["attn1"].processor for block in model.blocks] == before
    assert session_of(model) is None
    assert plan.made_for == GRID


@pytest.mark.parametrize(("family", "per_tile"), [("plain", 1), ("foveal", 1), ("pooled", 1), ("pooled", 4)])
def test_prediction_is_what_the_plan_does(model, tmp_path, family, per_tile):
    dense_steps = 0 if family == "pooled" else 1
    inputs = [run[1 - dense_steps : 2] for run in make_inputs()]  # pooled: one step, and nothing measured before it
    settings = {"judge": 1, "rows": None, "every": 1, "dense_steps": dense_steps, "refresh": None, "family": family}
    settings["per_tile"] = per_tile
    settings["probe"] = False  # attention of 1,024 tokens takes less than a call does besides
    plan = visparse.search(model, inputs=inputs, attention=0.4, **settings)
    path = write_plan(plan, tmp_path / "plan.json")
    assert SparsePlan.from_pretrained(path).to_dict() == plan.to_dict()
    assert path.stat().st_size < 6000
    seen = {}
    first = model.blocks[0]["attn1"]
    hook = first.register_forward_hook(lambda module, args, out: seen.setdefault(len(seen), out))
    with torch.no_grad():
        model(**inputs[0][-1])
        with visparse.sparsify(model, plan, strict=True):
            for arguments in inputs[0]:
                model(**arguments)
    hook.remove()
    *_, last = seen.values()
    error = float((last - seen[0]).norm() / seen[0].norm())
    assert error > 0
    assert (plan.proxies is None) == (family == "plain")
    assert plan.proxies is None or plan.proxies.per_tile == per_tile
    assert (plan.residual is None) == (family != "foveal")
    # heads are judged one by one: their errors are added up as if they were independent
    assert error == pytest.approx(plan.measured["layers"]["0"][0], rel=0.25)


def test_a_search_that_was_stopped_gives_the_same_plan(model, tmp_path, monkeypatch):
    from visparse.head_search.work import WorkFile

    settings = {"attention": 0.3, "judge": 2, "rows": 2, "dense_steps": 1, "refresh": None, "probe": False}
    settings["candidates"] = ["frame", "tube", "top8", "stripes4"]
    inputs = make_inputs(2)
    work = tmp_path / "a.jsonl"
    score = WorkFile.score

    def stop(self, key, found):
        if len(self.scores) == 5:
            raise KeyboardInterrupt
        score(self, key, found)

    monkeypatch.setattr(WorkFile, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        visparse.search(model, inputs=inputs, work=work, **settings)
    assert session_of(model) is None
    monkeypatch.setattr(WorkFile, "score", score)
    lines = work.read_text().splitlines()
    assert len(lines) == 8  # the header, the facts, five scores, the end of the first run
    with work.open("a") as file:
        file.write('{"key": [1, 2')  # as a kill leaves it
    resumed = visparse.search(model, inputs=inputs, work=work, **settings)
    one_go = tmp_path / "b.jsonl"
    one_go.write_text("\n".join(lines[:2]) + "\n")  # the same share and date
    whole = visparse.search(model, inputs=inputs, work=one_go, **settings)
    paths = [write_plan(plan, tmp_path / f"{i}.json") for i, plan in enumerate((resumed, whole))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # another goal uses the same scores: nothing is run
    with monkeypatch.context() as patch:
        patch.setattr(Synthetic, "forward", None)
        cheaper = visparse.search(model, inputs=inputs, work=work, **{**settings, "attention": 0.15})
    assert cheaper.measured["predicted"]["error"] >= whole.measured["predicted"]["error"]
    with pytest.raises(ValueError, match="belongs to a search with judge=2, this one has 1"):
        visparse.search(model, inputs=inputs, work=work, **{**settings, "judge": 1})


def test_the_published_rule_has_its_own_name(model):
    settings = {"judge": 1, "rows": 2, "dense_steps": 1, "rule": "sparse-vdit"}
    plan = visparse.search(model, inputs=make_inputs(), limit=1e6, **settings)
    modes = {name for layer in (0, 1) for name in plan.names(layer, 5, 1)}
    assert modes <= {"skip", "band8", "diagonals8", "stripes8"}
    strict = visparse.search(model, inputs=make_inputs(), limit=1e-9, **settings)
    assert all(strict.names(layer, 5, 1) is None for layer in (0, 1))
    assert strict.measured["goal"] == {"sparse-vdit": 1e-9}


def test_impossible_wishes_are_refused_before_scoring(model, monkeypatch):
    from visparse.head_search.score import Scorer

    monkeypatch.setattr(Scorer, "judge", None)
    with pytest.raises(
        ValueError, match=r"speedup: 50.0 is beyond the ceiling: attention is 50% .* at most 1.6. times"
    ):
        visparse.search(model, inputs=make_inputs(), speedup=50.0, share=0.5, dense_steps=1, family="plain")
    with pytest.raises(ValueError, match=r"attention's share of a step was measured on cpu, the rates are of 'h200'"):
        visparse.search(model, inputs=make_inputs(), speedup=1.2, dense_steps=1, rates="h200")
    with pytest.raises(ValueError, match=r"no attention was measured on 'abacus' .*measured: cpu"):
        visparse.search(model, inputs=make_inputs(), attention=0.3, dense_steps=1, rates="abacus")
    with pytest.raises(ValueError, match="inputs: wanted them for a bare denoiser"):
        visparse.search(model, attention=0.3)
    with (
        visparse.sparsify(model, "neighborhood", window=3, stride=1, dense_steps=0),
        pytest.raises(ValueError, match=r"this one is sparsified; call visparse.restore"),
    ):
        visparse.search(model, inputs=make_inputs(), attention=0.3, dense_steps=1)
    assert session_of(model) is None


def test_a_budget_that_is_too_small_is_refused(model):
    settings = {"inputs": make_inputs(), "judge": 1, "rows": 1, "dense_steps": 1, "family": "plain", "probe": False}
    with pytest.raises(ValueError, match=r"attention: the best plan within 1e-06 has a predicted error of (9|1\d)\d%"):
        visparse.search(model, attention=1e-6, **settings)
    with pytest.raises(ValueError, match=r"search: nothing was scored \(the time .* was over.*give it more minutes"):
        visparse.search(model, attention=0.3, minutes=1e-9, **settings)


def test_a_partial_result_keeps_other_layers_dense(model, tmp_path, monkeypatch):
    from visparse.head_search import capture
    from visparse.head_search.work import WorkFile

    score = WorkFile.score

    def over(self, key, found):
        score(self, key, found)
        raise capture.OutOfTimeError

    monkeypatch.setattr(WorkFile, "score", over)
    plan = visparse.search(model, inputs=make_inputs(), density=0.8, judge=1, rows=1, dense_steps=1, family="plain")
    assert plan.is_dense_layer(1)
    assert not plan.is_dense_layer(0)
    assert "partial: 1 of 2 layers were not scored and stay dense" in plan.notes


def outputs(model, plan, inputs, strict=True):
    with torch.no_grad(), visparse.sparsify(model, plan, strict=strict) as handle:
        found = [model(**arguments) for arguments in inputs]
        return found, handle.report().to_dict()["models"][0]["layers"]


def test_each_range_of_steps_is_allocated_on_its_own(model):
    inputs = make_inputs(length=8, flat=4)
    settings = {"attention": 0.5, "dense_steps": 1, "refresh": 4, "judge": 4, "rows": 4, "probe": False}
    plan = visparse.search(model, inputs=inputs, family="foveal", ranges=True, **settings)
    assert {rule.steps for rule in plan.assignment} >= {":4", "4:"}
    assert "its ranges of steps are those of a run of 8 steps" in plan.notes
    text = str(explain(plan, plan.model, Layout(GRID), 8))
    assert [line.split()[0] for line in text.splitlines() if line.strip()[0].isdigit()] == ["0", "1-3", "4", "5-7"]
    assert "measured" in next(line for line in text.splitlines() if line.split()[0] == "4")
    found, layers = outputs(model, plan, inputs[0])
    assert [layer["sparse_calls"] for layer in layers] == [6, 6]
    # each range does what a plan does that has its patterns all the time: nothing of the other range is reused
    for stage, steps in ((1, range(1, 4)), (4, range(5, 8))):
        rules = [
            {"pattern": name, "layers": layer, "heads": head}
            for layer in range(2)
            for head, name in enumerate(plan.names(layer, 5, stage) or ())
        ]
        assert len(rules) == 10
        alone, _ = outputs(model, replace(plan, assignment=rules), inputs[0])
        for step in steps:
            torch.testing.assert_close(found[step], alone[step], rtol=1e-5, atol=1e-5)
    same = visparse.search(model, inputs=inputs, family="foveal", **settings)
    assert {rule.steps for rule in same.assignment} == {"all"}


def test_ranges_start_where_the_foveal_family_measures_again():
    for refresh, starts in ((0.5, (0, 4)), (None, (0,)), (3, (0, 4)), (0.9, (0,)), ((4, 5), (0, 4)), (1, (0,))):
        made = [make_schedule(family, 8, 2, refresh, ranges=True) for family in ("plain", "foveal")]
        assert [one.starts for one in made] == [starts] * 2, refresh
        assert all(weight > 0 for one in made for weight in one.weights)
    assert make_schedule("pooled", 8, 0, 0.5, ranges=True).starts == (0, 4)
    assert make_schedule("plain", 8, 0, 0.5).starts == (0,)


def test_a_layer_whose_heads_are_all_skipped_runs_beside_others(model):
    names = {"skip": Skip(), "top4": TopK(share=0.25, score="mass_variance")}
    kept = {name: Candidate(name, "foveal", pattern) for name, pattern in names.items()}
    picks = {(0, layer, head): kept["skip" if layer == 0 else "top4"] for layer in range(2) for head in range(5)}
    fingerprint = ModelFingerprint(model_class="Synthetic", layers=2, heads=5, head_dim=SIZE)
    given = {"family": "foveal", "dense_steps": 1, "refresh": None, "notes": "", "measured": {}}
    plan = build_plan("x", picks, model=fingerprint, grid=GRID, **given)
    seen = []
    hook = model.blocks[0]["attn1"].register_forward_hook(lambda module, args, out: seen.append(out))
    first, later = make_inputs()[0][:2]
    found, layers = outputs(model, plan, [first, {**first, "timestep": later["timestep"]}])
    hook.remove()
    assert [layer["sparse_calls"] for layer in layers] == [1, 1]
    # skipped heads give their residual, which is all of the dense output
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_goal_that_one_family_cannot_reach_leaves_scores_for_the_next(model, tmp_path, monkeypatch):
    settings = {"inputs": make_inputs(), "judge": 1, "rows": 1, "dense_steps": 1, "refresh": 2, "probe": False}
    settings |= {"share": 0.9, "work": tmp_path / "work.jsonl", "candidates": ["tube", "top", "frame"]}
    hard = visparse.search(model, speedup=2.4, **settings)  # foveal: one dense and one measured step of four
    assert "plain family" in hard.notes
    with monkeypatch.context() as patch:
        patch.setattr(Synthetic, "forward", None)
        easy = visparse.search(model, attention=0.5, **settings)
        assert visparse.search(model, speedup=2.4, **settings).to_dict() == hard.to_dict()
    fresh = visparse.search(model, attention=0.5, **{**settings, "work": None})
    assert easy.assignment == fresh.assignment
    assert "foveal family" in easy.notes


def test_refining_a_bare_denoiser_is_refused_at_once(model, monkeypatch):
    monkeypatch.setattr(Synthetic, "forward", None)
    with pytest.raises(ValueError, match=r"refine: wanted a pipeline or a vision .* got a bare denoiser; leave it out"):
        visparse.search(model, inputs=make_inputs(), attention=0.3, dense_steps=1, refine=2)
    with pytest.raises(ValueError, match="grid: wanted a pipeline, got a bare Synthetic, whose inputs have their own"):
        visparse.search(model, inputs=make_inputs(), attention=0.3, dense_steps=1, grid=GRID)
