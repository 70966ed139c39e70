"""`pool_tokens` and `attend_proxies` as PyTorch operators: registration, compilation, choice, refusals."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import attend_proxies, pool_tokens
from visparse_kernels.proxies import api
from visparse_kernels.proxies.testing import random_case

CASE = random_case(length=40, n_proxies=37, block_q=16, head_group=[0, 1, -1], batch=2, head_dim=16)
K, V = torch.randn(2, 2, 40, 3, 16, generator=torch.Generator().manual_seed(0))
MEMBERS = torch.tensor([[0, 1, 2], [5, 9, -1], [30, -1, 39]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype) -> None:
    case = random_case(length=40, n_proxies=37, block_q=16, head_group=[0, 1, -1], batch=2, head_dim=16, dtype=dtype)
    for places in (None, case.q_order.clone()):
        torch.library.opcheck(api.attend_proxies_op, (*case.arguments(), places, 0.25, "auto"))
    k, v = K.to(dtype), V.to(dtype)
    bias, counts = torch.randn(2, 1, 40), torch.tensor([3, 2, 2])
    for extras in ((None, None, None), (bias, None, counts), (None, k, None), (bias, k, None)):
        torch.library.opcheck(api.pool_tokens_op, (k, v, MEMBERS, *extras, 0.25, "auto"))


def test_one_graph_and_no_recompile_for_other_contents() -> None:
    torch._dynamo.reset()

    def layer(case: object, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = pool_tokens(k, v, MEMBERS)
        tables = (case.head_group, case.q_order, case.block_q)
        return attend_proxies(case.q, case.out, case.lse, *pooled, case.hidden[..., :1].contiguous(), *tables)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        case = random_case(length=40, n_proxies=3, block_q=16, head_group=[0, 1, -1], batch=2, head_dim=16, seed=seed)
        wanted = layer(case, K + seed, V)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            got = compiled(case, K + seed, V)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_autocast_and_inference_mode() -> None:
    wanted = attend_proxies(*CASE.arguments())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend_proxies(*CASE.arguments())[0], wanted[0])


def test_names_choose_and_the_variable_too(monkeypatch) -> None:
    monkeypatch.delenv("VISPARSE_IMPL", raising=False)
    seen = []
    for name in ("cpu", "reference"):
        module = api._CANDIDATES[name]
        for call in ("pool", "attend"):
            real = getattr(module, call)
            monkeypatch.setattr(module, call, lambda *a, name=name, real=real: (seen.append(name), real(*a))[1])
    pool_tokens(K, V, MEMBERS)
    attend_proxies(*CASE.arguments())
    assert seen == ["cpu", "cpu"]
    monkeypatch.setenv("VISPARSE_IMPL", "reference")
    attend_proxies(*CASE.arguments())
    attend_proxies(*CASE.arguments(), impl="cpu")
    assert seen[2:] == ["reference", "cpu"]
    wide = [x.double() for x in (K, V)]
    monkeypatch.delenv("VISPARSE_IMPL")
    assert pool_tokens(*wide, MEMBERS)[0].dtype == torch.float64
    assert seen[4:] == ["reference"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device can serve the case")
@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_what_is_named_and_cannot_serve_raises(name, monkeypatch) -> None:
    monkeypatch.setenv("VISPARSE_IMPL", name)
    text = r"impl: 'triton' cannot serve this case; .*triton: needs tensors on a CUDA device, got cpu; cpu: can serve"
    with pytest.raises(ValueError, match=text):
        attend_proxies(*CASE.arguments())
    with pytest.raises(ValueError, match=text):
        pool_tokens(K, V, MEMBERS)
    with pytest.raises(ValueError, match=r"'cpu' cannot serve this case; .*cpu: needs fp32, bf16 or fp16"):
        pool_tokens(K.double(), V.double(), MEMBERS, impl="cpu")


POOL_ERRORS = [
    ({"impl": "gluon"}, ValueError, r"impl: wanted one of auto, reference, cpu, triton, got 'gluon'"),
    ({"k": K[0]}, ValueError, r"k: wanted \[batch, tokens, heads, head_dim\], got \[40, 3, 16\]"),
    ({"k": K[..., :9]}, ValueError, r"k: wanted a head_dim that is a multiple of 8 up to 256, got 9"),
    ({"v": V[:, 1:]}, ValueError, r"v: wanted shape \[2, 40, 3, 16\], got \[2, 39, 3, 16\]"),
    ({"v": V.half()}, TypeError, r"v: wanted torch.float32 as the first argument has, got torch.float16"),
    ({"k": K.int()}, TypeError, r"k: wanted fp16, bf16, fp32 or fp64, got torch.int32"),
    ({"members": MEMBERS.long()}, TypeError, r"members: wanted an int32 tensor, got torch.int64; cast it"),
    ({"members": MEMBERS[0]}, ValueError, r"members: wanted 2 axes, got shape \[3\]"),
    ({"members": MEMBERS[:0]}, ValueError, r"members: wanted .* at least one of each, got \[0, 3\]"),
    (
        {"key_bias": torch.zeros(3, 1, 40)},
        ValueError,
        r"key_bias: wanted shape \[1 or 2, 1 or 3, 40\], got \[3, 1, 40\]",
    ),
    ({"key_bias": torch.ones(1, 1, 40).bool()}, TypeError, r"key_bias: wanted a float tensor .* turn a mask into 0"),
    ({"query": K[:1]}, ValueError, r"query: wanted shape \[2, 40, 3, 16\], got \[1, 40, 3, 16\]"),
    ({"counts": torch.ones(4)}, ValueError, r"counts: wanted shape \[3\], got \[4\]; give one number of tokens"),
    ({"counts": torch.ones(3).bool()}, TypeError, r"counts: wanted int or float numbers of tokens, got torch.bool"),
    ({"scale": -1.0}, ValueError, r"scale: wanted a positive finite number, got -1.0"),
    ({"members": MEMBERS.to("meta")}, ValueError, r"members: wanted the device of k, cpu, got meta; move it there"),
    ({"v": V.clone().requires_grad_()}, ValueError, r"v: .* got requires_grad=True; pool_tokens is for inference only"),
]


@pytest.mark.parametrize(("change", "error", "text"), POOL_ERRORS)
def test_error_texts_of_pool_tokens(change, error, text) -> None:
    given = {"k": K, "v": V, "members": MEMBERS} | change
    with pytest.raises(error, match=text):
        pool_tokens(given.pop("k"), given.pop("v"), given.pop("members"), **given)


ATTEND_ERRORS = [
    ({"q": CASE.q[0]}, ValueError, r"q: wanted \[batch, tokens, heads, head_dim\], got \[40, 3, 16\]"),
    ({"out": CASE.out[:, 1:]}, ValueError, r"out: wanted shape \[2, 40, 3, 16\], got \[2, 39, 3, 16\]"),
    ({"out": CASE.out.half()}, TypeError, r"out: wanted torch.float32 as the first argument has, got torch.float16"),
    ({"lse": CASE.lse.mT}, ValueError, r"lse: wanted shape \[2, 3, 40\], got \[2, 40, 3\]; .* return_lse=True"),
    ({"lse": CASE.lse.half()}, TypeError, r"lse: wanted torch.float32 beside q in torch.float32, got torch.float16"),
    ({"pooled_k": CASE.pooled_k[:1]}, ValueError, r"pooled_k: wanted shape \[2, 37, 3, 16\], got \[1, 37, 3, 16\]"),
    ({"pooled_k": CASE.pooled_k[:, :0]}, ValueError, r"pooled_k: wanted at least one proxy, got none"),
    ({"pooled_v": CASE.pooled_v[:, 1:]}, ValueError, r"pooled_v: wanted shape \[2, 37, 3, 16\], got \[2, 36, 3, 16\]"),
    ({"weight": CASE.weight[..., 1:]}, ValueError, r"weight: wanted shape \[1 or 2, 1 or 3, 37\], got \[1, 1, 36\]"),
    ({"weight": CASE.weight.double()}, TypeError, r"weight: wanted torch.float32 .* got torch.float64"),
    ({"hidden": CASE.hidden.bool()}, TypeError, r"hidden: wanted an int32 tensor, got torch.bool"),
    ({"hidden": CASE.hidden[0]}, ValueError, r"hidden: wanted 4 axes, got shape \[2, 3, 2\]"),
    ({"hidden": CASE.hidden[..., :1]}, ValueError, r"hidden: wanted shape \[1 or 2, 2, 3, 2\], got \[1, 2, 3, 1\]"),
    ({"head_group": CASE.head_group[1:]}, ValueError, r"head_group: wanted shape \[3\], got \[2\]"),
    ({"q_order": CASE.q_order.expand(3, -1)}, ValueError, r"q_order: wanted shape \[1 or 2, 48\], got \[3, 48\]"),
    ({"block_q": 20}, ValueError, r"q_order, block_q: wanted a multiple of block_q = 20 slots .* got 48 slots"),
    ({"q_order": CASE.q_order[:, :32]}, ValueError, r"q_order, block_q: .* that hold 40 tokens, got 32 slots"),
    ({"hidden": CASE.hidden.to("meta")}, ValueError, r"hidden: wanted the device of q, cpu, got meta"),
    ({"q": CASE.q.clone().requires_grad_()}, ValueError, r"q: .* attend_proxies is for inference only"),
]


@pytest.mark.parametrize(("change", "error", "text"), ATTEND_ERRORS)
def test_error_texts_of_attend_proxies(change, error, text) -> None:
    with pytest.raises(error, match=text):
        attend_proxies(*replace(CASE, **change).arguments())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"out_order": CASE.q_order.long()}, TypeError, r"out_order: wanted an int32 tensor, got torch.int64"),
        ({"out_order": CASE.q_order[0]}, ValueError, r"out_order: wanted 2 axes"),
        ({"out_order": CASE.q_order[:, :32]}, ValueError, r"out_order: wanted shape \[1, 48\], got \[1, 32\]"),
        ({"out_order": CASE.q_order.to("meta")}, ValueError, r"out_order: wanted the device of q, cpu, got meta"),
    ],
)
def test_error_texts_of_the_places_of_results(change, error, text) -> None:
    with pytest.raises(error, match=text):
        attend_proxies(*CASE.arguments(), **change)
    two = replace(CASE, q_order=CASE.q_order.expand(2, -1))
    with pytest.raises(ValueError, match=r"q_order: wanted shape \[1, 48\], got \[2, 48\]; with out_order all groups"):
        attend_proxies(*two.arguments(), out_order=CASE.q_order)


def test_scale_and_impl_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scale: wanted a positive finite number, got 0"):
        attend_proxies(*CASE.arguments(), scale=0.0)
    with pytest.raises(ValueError, match=r"impl: wanted one of auto, reference, cpu, triton, got 'fast'"):
        attend_proxies(*CASE.arguments(), impl="fast")
