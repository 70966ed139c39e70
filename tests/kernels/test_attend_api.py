"""`attend` as a PyTorch operator: registration, choice of the implementation, refusals."""

import os
import subprocess
import sys

import pytest
import torch

from visparse_kernels import attend, choose, explain, preferred_blocks
from visparse_kernels.attend.api import attend_op
from visparse_kernels.env import check_inputs, impl_from_env
from visparse_kernels.testing import random_lists

LISTS = random_lists(q_len=40, k_len=50, block_q=32, block_k=32, head_group=[0, 1, -1], shuffled=True)


@pytest.fixture
def qkv(make_qkv):
    return make_qkv(LISTS, batch=2, head_dim=16)


def op_arguments(q, k, v, lists, key_bias=None, impl="auto"):
    tables = (lists.head_group, lists.q_order, lists.k_order, lists.full_offsets, lists.full_indices)
    masked = (lists.partial_offsets, lists.partial_indices, lists.partial_tiles, lists.tiles)
    return (q, k, v, key_bias, *tables, *masked, None, None, [], lists.block_q, lists.block_k, 0.25, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(qkv, dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv)
    torch.library.opcheck(attend_op, op_arguments(q, k, v, LISTS))
    torch.library.opcheck(attend_op, op_arguments(q, k, v, LISTS, key_bias=torch.zeros(1, 1, 50)))


def test_one_graph_and_no_recompile_per_layer(make_qkv) -> None:
    torch._dynamo.reset()
    layer = torch.compile(
        lambda q, k, v, lists: attend(q, k, v, lists, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    layers = [
        random_lists(q_len=70, k_len=70, block_q=32, block_k=32, head_group=[0, 1], keep=keep, seed=seed)
        for seed, keep in enumerate((0.5, 0.6, 0.7, 0.8, 0.9))
    ]
    q, k, v = make_qkv(layers[0])
    for lists in layers[:3]:
        assert torch.equal(layer(q, k, v, lists)[0], attend(q, k, v, lists))
    with torch.compiler.set_stance("fail_on_recompile"):
        for lists in layers[3:]:
            out, lse = layer(q, k, v, lists)
            wanted, wanted_lse = attend(q, k, v, lists, return_lse=True)
            assert torch.equal(out, wanted)
            assert torch.equal(lse, wanted_lse)


def test_autocast_and_inference_mode(qkv) -> None:
    wanted = attend(*qkv, LISTS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*qkv, LISTS), wanted)


def test_gradients_are_refused_unless_switched_off(qkv) -> None:
    q, k, v = qkv
    k.requires_grad_()
    with pytest.raises(ValueError, match=r"k: .* got requires_grad=True; .* inference only: call it"):
        attend(q, k, v, LISTS)
    with torch.no_grad():
        assert not attend(q, k, v, LISTS).requires_grad


def test_choice_and_reasons(qkv, monkeypatch) -> None:
    monkeypatch.delenv("VISPARSE_IMPL", raising=False)
    q = qkv[0]
    assert [(name, usable) for name, usable, _ in explain(q, LISTS)] == [
        ("gluon", False),
        ("triton", False),
        ("cpu", True),
        ("reference", True),
    ]
    assert choose(q, LISTS) == "cpu"
    assert choose(q.double(), LISTS) == "reference"
    assert choose(q, LISTS, "reference") == "reference"
    monkeypatch.setenv("VISPARSE_IMPL", "reference")
    assert choose(q, LISTS) == "reference"
    assert choose(q, LISTS, "cpu") == "cpu"


def test_asked_for_by_name_there_is_no_fallback(qkv, monkeypatch) -> None:
    q, k, v = qkv
    with pytest.raises(ValueError, match=r"'cpu' cannot serve .*\(gluon: .*triton: .*cpu: needs fp32.*reference: can"):
        attend(q.double(), k.double(), v.double(), LISTS, impl="cpu")
    monkeypatch.setenv("VISPARSE_IMPL", "triton")
    with pytest.raises(ValueError, match=r"'triton' cannot serve this case.*needs tensors on a CUDA device, got cpu"):
        attend(q, k, v, LISTS)


def test_environment_variables(monkeypatch) -> None:
    monkeypatch.setenv("VISPARSE_IMPL", "fast")
    with pytest.raises(
        ValueError, match="VISPARSE_IMPL: wanted one of auto, reference, cpu, triton, gluon, got 'fast'"
    ):
        impl_from_env()
    monkeypatch.setenv("VISPARSE_CHECK", "yes")
    with pytest.raises(ValueError, match="VISPARSE_CHECK: wanted one of 0, 1, got 'yes'"):
        check_inputs()


def test_nan_is_named_where_the_check_is_on(qkv, monkeypatch) -> None:
    q, k, v = qkv
    k[1, 7, 2, 5] = torch.nan
    monkeypatch.delenv("VISPARSE_CHECK", raising=False)
    attend(q, k, v, LISTS)
    monkeypatch.setenv("VISPARSE_CHECK", "1")
    with pytest.raises(ValueError, match=r"k: wanted finite values, got nan at .* = \[1, 7, 2, 5\], 1 bad in all"):
        attend(q, k, v, LISTS)


BAD = {
    "impl": (lambda q, k, v: {"impl": "fast"}, ValueError, "impl: wanted one of auto, .* got 'fast'"),
    "lists": (lambda q, k, v: {"lists": None}, TypeError, "lists: wanted BlockLists, got NoneType"),
    "axes": (lambda q, k, v: {"q": q[0]}, ValueError, r"q, k, v: wanted \[batch, tokens, heads, head_dim\]"),
    "heads first": (
        lambda q, k, v: {"q": q.transpose(1, 2)},
        ValueError,
        "q: wanted 40 tokens .* got 3 and 40",
    ),
    "tokens": (lambda q, k, v: {"q": q[:, :39]}, ValueError, "q: wanted 40 tokens and 3 heads, .* got 39 and 3"),
    "keys": (lambda q, k, v: {"k": k[:, :49]}, ValueError, r"k: wanted \[2, 50, 3, 16\] .* got \[2, 49, 3, 16\]"),
    "values": (lambda q, k, v: {"v": v[..., :8]}, ValueError, r"v: wanted \[2, 50, 3, 16\]"),
    "dtype": (lambda q, k, v: {"k": k.half()}, TypeError, "one dtype of fp16, .* got torch.float32, torch.float16"),
    "int": (lambda q, k, v: {"q": q.int(), "k": k.int(), "v": v.int()}, TypeError, "got torch.int32"),
    "device": (lambda q, k, v: {"v": v.to("meta")}, ValueError, "wanted one device, got cpu, meta"),
    "scale": (lambda q, k, v: {"scale": 0.0}, ValueError, "scale: wanted a positive finite number, got 0.0"),
    "scale nan": (lambda q, k, v: {"scale": float("nan")}, ValueError, "scale: wanted a positive finite"),
    "head_dim": (
        lambda q, k, v: {"q": q[..., :12], "k": k[..., :12], "v": v[..., :12]},
        ValueError,
        "a multiple of 8 up to 256, got 12; pad",
    ),
    "bias shape": (
        lambda q, k, v: {"key_bias": torch.zeros(2, 50)},
        ValueError,
        r"key_bias: wanted \[2 or 1, 3 or 1",
    ),
    "bias dtype": (
        lambda q, k, v: {"key_bias": torch.ones(1, 1, 50, dtype=torch.bool)},
        TypeError,
        "key_bias: wanted a float tensor .* got torch.bool; turn a mask into 0 and -inf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case, qkv) -> None:
    change, error, text = BAD[case]
    arguments = dict(zip("qkv", qkv, strict=True)) | {"lists": LISTS} | change(*qkv)
    with pytest.raises(error, match=text):
        attend(**arguments)


def test_preferred_blocks_can_be_run() -> None:
    for head_dim in (64, 128, 256):
        block_q, block_k = preferred_blocks("cpu", head_dim)
        assert block_q > 0
        assert block_k % 32 == 0
    assert preferred_blocks("cuda", 128) == (128, 64)


def test_import_needs_no_triton_and_starts_no_cuda() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, visparse_kernels as vk\n"
        "from visparse_kernels.testing import random_lists\n"
        "lists = random_lists(q_len=8, k_len=8, block_q=8, block_k=32, head_group=[0])\n"
        "q = torch.zeros(1, 8, 1, 8)\n"
        "assert vk.attend(q, q, q, lists).shape == q.shape\n"
        "name, usable, reason = vk.explain(q, lists)[1]\n"
        "assert (name, usable) == ('triton', False) and 'needs the triton package' in reason, reason\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISPARSE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
