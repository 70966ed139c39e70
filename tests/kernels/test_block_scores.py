"""Block scores: every implementation against the definition in fp64, samples, padding, and error texts."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import attend, block_scores
from visparse_kernels.block_scores import cpu_impl, pooled, reference
from visparse_kernels.block_scores.slots import sampled_rows
from visparse_kernels.block_scores.testing import check_scores, definition, pooled_definition, random_case
from visparse_kernels.lists import BlockLists
from visparse_kernels.testing import check_close, poisoned_memory

KINDS = ["mass", "mass_variance"]
CASES = {
    "odd": {"q_len": 61, "k_len": 67, "block_q": 16, "block_k": 32, "batch": 2},
    "orders": {"q_len": 50, "k_len": 90, "block_q": 32, "block_k": 64, "padding": "anywhere"},
    "blocks of padding": {"q_len": 40, "k_len": 50, "block_q": 16, "block_k": 16, "padding": "blocks", "sample": 4},
    "no padding": {"q_len": 64, "k_len": 96, "block_q": 16, "block_k": 32, "sample": 2},
    "sampled": {"q_len": 61, "k_len": 67, "block_q": 16, "block_k": 32, "sample": 4, "padding": "anywhere"},
    "one of each": {"q_len": 61, "k_len": 40, "block_q": 24, "block_k": 24, "sample": 24, "padding": "anywhere"},
    "bias": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "bias": (1, 1), "padding": "anywhere"},
    "bias of heads": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "batch": 2, "bias": (2, 2), "sample": 2},
    "peaked": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "spread": 20.0, "padding": "anywhere"},
    "one key": {"q_len": 5, "k_len": 7, "block_q": 4, "block_k": 1},
    "small heads": {"q_len": 33, "k_len": 35, "block_q": 8, "block_k": 8, "head_dim": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_error_rule(case, kind, impl) -> None:
    drawn = random_case(**CASES[case], seed=1)
    with poisoned_memory():
        scores = drawn.scores(kind, impl)
    assert scores.dtype == torch.float32
    check_scores(scores, drawn, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_rule_in_half_precision(dtype, kind) -> None:
    drawn = random_case(**CASES["sampled"], dtype=dtype)
    check_scores(drawn.scores(kind), drawn, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_fp64(kind) -> None:
    drawn = random_case(**CASES["bias"], dtype=torch.float64)
    scores = drawn.scores(kind)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, definition(drawn, kind, torch.float64), rtol=1e-10, atol=1e-14)


def test_some_query_blocks_at_a_time(monkeypatch) -> None:
    drawn = random_case(**CASES["orders"])
    whole = [drawn.scores("mass_variance", impl) for impl in ("reference", "cpu")]
    monkeypatch.setattr(reference, "_SCRATCH", 1)
    monkeypatch.setattr(cpu_impl, "_LOGITS", 1)
    for impl, wanted in zip(("reference", "cpu"), whole, strict=True):
        torch.testing.assert_close(drawn.scores("mass_variance", impl), wanted)


@pytest.mark.parametrize(
    ("case", "parts"),
    [(case, parts) for case, sizes in CASES.items() for parts in (1, 4, 8) if sizes["block_k"] % parts == 0],
)
def test_pooled(case, parts) -> None:
    drawn = random_case(**CASES[case], parts=parts, seed=1)
    wanted, plain = (pooled_definition(drawn, dtype) for dtype in (torch.float64, torch.float32))
    with poisoned_memory():
        scores = drawn.scores("pooled")
    check_close("pooled", scores, wanted, plain, torch.float32)
    alive = wanted.sum(-1) > 0
    torch.testing.assert_close(scores.sum(-1)[alive], torch.ones(int(alive.sum())))


def test_pooled_in_fp64_some_query_blocks_at_a_time(monkeypatch) -> None:
    drawn = random_case(**CASES["bias of heads"], parts=4, dtype=torch.float64)
    monkeypatch.setattr(pooled, "_LOGITS", 1)
    wanted = pooled_definition(drawn, torch.float64)
    torch.testing.assert_close(drawn.scores("pooled"), wanted, rtol=1e-10, atol=1e-14)


def test_parts_of_one_key_are_exact_for_blocks_of_one_query() -> None:
    drawn = random_case(q_len=12, k_len=96, block_q=1, block_k=32, parts=32)
    wanted, plain = (definition(drawn, "mass", dtype) for dtype in (torch.float64, torch.float32))
    check_close("pooled", drawn.scores("pooled"), wanted, plain, torch.float32)


def test_parts_see_what_one_mean_does_not() -> None:
    # a quarter of the keys of block 1 draws the queries; the others push them away, so the mean key says nothing
    q, k = torch.zeros(1, 16, 1, 8), torch.zeros(1, 64, 1, 8)
    q[..., 0], k[:, 32:40, :, 0], k[:, 40:, :, 0] = 6.0, 6.0, -2.0
    orders = {"q_order": torch.arange(16, dtype=torch.int32), "k_order": torch.arange(64, dtype=torch.int32)}
    one, four = (
        block_scores(q, k, None, **orders, block_q=16, block_k=32, kind="pooled", parts=parts, scale=0.25)
        for parts in (1, 4)
    )
    torch.testing.assert_close(one, torch.tensor([0.5, 0.5]).expand_as(one))
    assert float(four[..., 1].min()) > 0.99


def test_pooled_in_bf16_sums_in_fp32() -> None:
    drawn = random_case(q_len=512, k_len=512, block_q=256, block_k=256, parts=2, dtype=torch.bfloat16)
    wanted = pooled_definition(drawn, torch.float64)
    torch.testing.assert_close(drawn.scores("pooled").double(), wanted, rtol=1e-5, atol=1e-6)


def test_pooled_with_a_bias() -> None:
    drawn = random_case(**CASES["orders"])
    even = torch.full((1, 1, 90), 1.5)
    torch.testing.assert_close(replace(drawn, key_bias=even).scores("pooled"), drawn.scores("pooled"))
    # keys that hold one vector are exact whatever the bias
    bias = torch.randn(1, 2, 90)
    bias[..., ::4] = -torch.inf
    same = replace(drawn, k=drawn.k[:, :1].expand(-1, 90, -1, -1), key_bias=bias)
    scores = same.scores("pooled")
    for block, slots in enumerate(same.k_order.view(-1, 64)):
        share = bias[0][:, slots[slots >= 0].long()].exp().sum(-1) / bias[0].exp().sum(-1)
        torch.testing.assert_close(scores[0, :, 0, block], share)
    hidden = replace(drawn, key_bias=torch.full((1, 1, 90), -torch.inf)).scores("pooled")
    assert torch.equal(hidden, torch.zeros_like(hidden))


def test_mass_of_all_blocks_is_one() -> None:
    drawn = random_case(**CASES["orders"])
    for impl in ("reference", "cpu"):
        mass = drawn.scores("mass", impl).sum(-1)
        alive = (drawn.q_order.view(-1, 32) >= 0).any(1)
        torch.testing.assert_close(mass, alive.float().expand_as(mass), rtol=1e-5, atol=1e-5)


def test_the_lse_of_attend_fits() -> None:
    drawn = random_case(q_len=100, k_len=100, block_q=32, block_k=32)
    lists = BlockLists.dense(q_len=100, k_len=100, heads=2, block_q=32, block_k=32)
    _, lse = attend(drawn.q, drawn.k, drawn.k, lists, scale=drawn.scale, return_lse=True)
    check_scores(replace(drawn, lse=lse).scores("mass"), drawn, "mass")


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_one_key_has_no_variance(kind) -> None:
    drawn = random_case(**CASES["one key"])
    for impl in ("reference", "cpu"):
        scores = drawn.scores(kind, impl)
        assert bool((scores == 0).all()) == (kind == "mass_variance")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_padding_copies_nothing(kind, impl) -> None:
    # token 0, which a padding slot would read if -1 were taken for a token, lies in no slot and is NaN
    drawn = random_case(**CASES["orders"])
    orders = {name: getattr(drawn, name).clone() for name in ("q_order", "k_order")}
    for order in orders.values():
        order[order == 0] = -1
    drawn = replace(drawn, **orders)
    poisoned = replace(drawn, q=drawn.q.clone(), k=drawn.k.clone(), lse=drawn.lse.clone())
    for tensor in (poisoned.q[:, 0], poisoned.k[:, 0], poisoned.lse[:, :, 0]):
        tensor.fill_(torch.nan)
    impl = "auto" if kind == "pooled" else impl
    assert torch.equal(poisoned.scores(kind, impl), drawn.scores(kind, impl))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_query_that_sees_nothing_weighs_nothing(impl) -> None:
    drawn = random_case(q_len=32, k_len=64, block_q=16, block_k=32, batch=2, bias=(2, 1))
    drawn.key_bias[1] = -torch.inf  # type: ignore[index]
    drawn = replace(drawn, lse=torch.stack([drawn.lse[0], torch.full_like(drawn.lse[1], -torch.inf)]))
    for kind in KINDS:
        scores = drawn.scores(kind, impl)
        assert torch.equal(scores[1], torch.zeros_like(scores[1]))
        assert bool((scores[0] > 0).all())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_strides(impl) -> None:
    drawn = random_case(**CASES["odd"])
    wanted = drawn.scores("mass_variance", impl)
    heads_first = drawn.q.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.zeros(2, 68, 2, 80)[:, 1:, :, 3:67].copy_(drawn.k)
    torch.testing.assert_close(replace(drawn, q=heads_first, k=sliced).scores("mass_variance", impl), wanted)


def test_samples_are_real_tokens() -> None:
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, 8, 9, -1, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1])
    rows = sampled_rows(order.to(torch.int32), 8, 4)
    assert rows.tolist() == [[0, 4], [8, -1], [-1, -1]]
    assert sampled_rows(order.to(torch.int32), 8, 2).tolist() == [[0, 2, 4, 6], [8, 10, -1, -1], [-1] * 4]


def test_sampling_a_smooth_field_changes_little_and_all_equal_queries_nothing() -> None:
    drawn = random_case(q_len=64, k_len=96, block_q=16, block_k=32)
    same = replace(drawn, q=drawn.q[:, :1].expand(-1, 64, -1, -1), lse=drawn.lse[:, :, :1].expand(-1, -1, 64))
    torch.testing.assert_close(replace(same, sample=16).scores("mass_variance"), same.scores("mass_variance"))
    assert not torch.allclose(replace(drawn, sample=16).scores("mass"), drawn.scores("mass"), rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", ["scale", "sample", "order", "heads"])
def test_a_broken_score_breaks_the_error_rule(broken, kind) -> None:
    drawn = random_case(**CASES["sampled"])
    scores = drawn.scores(kind)
    wrong = {
        "scale": replace(drawn, scale=0.13).scores(kind),
        "sample": replace(drawn, sample=1).scores(kind),
        "order": replace(drawn, k_order=drawn.k_order.roll(1)).scores(kind),
        "heads": scores.flip(1),
    }[broken]
    with pytest.raises(AssertionError, match="worst at"):
        check_scores(wrong, drawn, kind)


def test_compiles_without_a_break() -> None:
    drawn = random_case(**CASES["odd"], parts=4)

    def scores(q, k, lse):
        case = replace(drawn, q=q, k=k, lse=lse)
        return replace(case, parts=1).scores("mass_variance"), case.scores("pooled")

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(drawn.q, drawn.k, drawn.lse), scores(drawn.q, drawn.k, drawn.lse), strict=True):
        torch.testing.assert_close(got, wanted)


ERRORS = {
    "kind": (
        {"kind": "sum"},
        ValueError,
        r"kind: wanted one of mass, mass_variance, pooled, got 'sum'",
    ),
    "impl": ({"impl": "gluon"}, ValueError, r"impl: wanted one of auto, .*, got 'gluon'"),
    "pooled impl": ({"kind": "pooled", "impl": "cpu"}, ValueError, r"impl: wanted 'auto' for pooled scores"),
    "parts": ({"kind": "pooled", "parts": 3}, ValueError, r"parts: wanted a divisor of block_k = 16, got 3; 1 cuts"),
    "no parts": ({"kind": "pooled", "parts": 0}, ValueError, r"parts: wanted a divisor of block_k = 16, got 0; 1 cuts"),
    "exact parts": ({"parts": 4}, ValueError, r"parts: wanted 1 for kind='mass', .*, got 4; leave it out"),
    "rank": ({"q": torch.zeros(3, 4, 5)}, ValueError, r"q, k: wanted \[batch, tokens, heads, head_dim\].*transpose"),
    "heads": ({"k": torch.zeros(1, 40, 3, 8)}, ValueError, r"q, k: .* got \[1, 40, 2, 8\] and \[1, 40, 3, 8\]"),
    "dtype": ({"k": torch.zeros(1, 40, 2, 8).half()}, TypeError, r"q, k: wanted one dtype .*; cast both"),
    "order dtype": ({"q_order": torch.arange(48)}, TypeError, r"q_order: wanted an int32 tensor, got torch.int64"),
    "order length": ({"k_order": torch.zeros(20, dtype=torch.int32)}, ValueError, r"k_order: .*block_k = 16.*pad"),
    "sample": ({"sample": 3}, ValueError, r"sample: wanted a divisor of block_q = 16, got 3"),
    "sample 0": ({"sample": 0}, ValueError, r"sample: wanted a divisor of block_q = 16, got 0"),
    "scale": ({"scale": -1.0}, ValueError, r"scale: wanted a positive finite number, got -1.0"),
    "no lse": ({"lse": None}, ValueError, r"lse: wanted the log-sum-exp .* kind='mass', got None.*return_lse=True"),
    "lse": ({"lse": torch.zeros(1, 40, 2)}, ValueError, r"lse: wanted floats \[1, 2, 40\].*got torch.float32 \[1, 40"),
    "bias": ({"key_bias": torch.zeros(1, 3, 40)}, ValueError, r"key_bias: wanted floats \[1 or 1, 2 or 1, 40\]"),
    "bias dtype": ({"key_bias": torch.ones(1, 1, 40).bool()}, ValueError, r"key_bias: .*turn a mask into 0 and -inf"),
    "device": ({"lse": torch.zeros(1, 2, 40, device="meta")}, ValueError, r"wanted one device, got cpu, meta"),
    "cannot": ({"impl": "triton"}, ValueError, r"impl: 'triton' cannot serve this case \(needs tensors on a CUDA"),
    "cpu in fp64": (
        {"impl": "cpu", "q": torch.zeros(1, 40, 2, 8).double(), "k": torch.zeros(1, 40, 2, 8).double()},
        ValueError,
        r"impl: 'cpu' cannot serve this case \(needs fp32, bf16 or fp16, got torch.float64\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name) -> None:
    changed, error, text = ERRORS[name]
    arguments = {
        "q": torch.zeros(1, 40, 2, 8),
        "k": torch.zeros(1, 40, 2, 8),
        "lse": torch.zeros(1, 2, 40),
        "q_order": torch.arange(48, dtype=torch.int32),
        "k_order": torch.arange(48, dtype=torch.int32),
        "block_q": 16,
        "block_k": 16,
    } | changed
    with pytest.raises(error, match=text):
        block_scores(arguments.pop("q"), arguments.pop("k"), arguments.pop("lse"), **arguments)
