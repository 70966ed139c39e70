"""Agent attention equals its definition, written here token by token."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from visparse.nn import AgentAttention

DIM, HEADS = 12, 3


def make(size: tuple[int, int], agents: tuple[int, int], class_tokens: int) -> AgentAttention:
    torch.manual_seed(0)
    module = AgentAttention(DIM, HEADS, map_size=size, agents=agents, class_tokens=class_tokens, qkv_bias=True).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return module


def tokens(count: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sample(line: Tensor, length: int, at: int) -> Tensor:
    """Linear interpolation along the last axis, stretched to `length` places: cell centres meet, ends are held."""
    old = line.shape[-1]
    where = max(0.0, (at + 0.5) * old / length - 0.5)
    low = min(int(where), old - 1)
    high = min(low + 1, old - 1)
    return line[..., low] * (1 - (where - low)) + line[..., high] * (where - low)


def bias_at(m: AgentAttention, towards_keys: bool, agent: int, head: int, place: int, size: tuple[int, int]) -> Tensor:
    """Bias between an agent and a token, for one of the two softmaxes."""
    if place < m.class_tokens:
        return m.ac_bias[0, head, agent, place] if towards_keys else m.ca_bias[0, head, place, agent]
    row, column = divmod(place - m.class_tokens, size[1])
    coarse = (m.an_bias if towards_keys else m.na_bias)[head, agent]
    rows = m.ah_bias[0, head, agent, :, 0] if towards_keys else m.ha_bias[0, head, :, 0, agent]
    columns = m.aw_bias[0, head, agent, 0] if towards_keys else m.wa_bias[0, head, 0, :, agent]
    fine = sample(sample(coarse, size[1], column), size[0], row)
    return fine + sample(rows, size[0], row) + sample(columns, size[1], column)


def pooled(x: Tensor, size: tuple[int, int], agents: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a map [h * w, C] to [agents, C]."""
    cells = []
    for a in range(agents[0]):
        for b in range(agents[1]):
            rows = range(a * size[0] // agents[0], math.ceil((a + 1) * size[0] / agents[0]))
            columns = range(b * size[1] // agents[1], math.ceil((b + 1) * size[1] / agents[1]))
            cells.append(torch.stack([x[r * size[1] + c] for r in rows for c in columns]).mean(0))
    return torch.stack(cells)


def convolved(m: AgentAttention, v: Tensor, place: int, size: tuple[int, int]) -> Tensor:
    """The 3 x 3 convolution of each channel at one token of the map; outside of it are zeros."""
    row, column = divmod(place, size[1])
    result = m.dwc.bias.clone()
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            r, c = row + dr, column + dc
            if 0 <= r < size[0] and 0 <= c < size[1]:
                result = result + m.dwc.weight[:, 0, dr + 1, dc + 1] * v[r * size[1] + c]
    return result


def definition(m: AgentAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Agent attention of one sequence [N, C]."""
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    agents = pooled(q[m.class_tokens :], size, m.agents)
    width = DIM // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        a, kk, vv = agents[:, part], k[:, part], v[:, part]
        gathered = []
        for i, agent in enumerate(a):
            logits = [agent @ key / width**0.5 + bias_at(m, True, i, head, n, size) for n, key in enumerate(kk)]
            gathered.append(torch.stack(logits).softmax(0) @ vv)
        read = []
        for n, query in enumerate(q[:, part]):
            logits = [query @ agent / width**0.5 + bias_at(m, False, i, head, n, size) for i, agent in enumerate(a)]
            read.append(torch.stack(logits).softmax(0) @ torch.stack(gathered))
        heads.append(torch.stack(read))
    out = torch.cat(heads, -1)
    local = [convolved(m, v[m.class_tokens :], place, size) for place in range(size[0] * size[1])]
    out = torch.cat([out[: m.class_tokens], out[m.class_tokens :] + torch.stack(local)])
    return m.proj(out)


@pytest.mark.parametrize(
    ("made_for", "size", "agents", "class_tokens"),
    [
        ((6, 6), (6, 6), (3, 3), 1),  # as published: square, one class token
        ((5, 7), (5, 7), (2, 3), 0),  # not square, cells of the pooling overlap
        ((5, 7), (8, 4), (2, 2), 2),  # another map than it was made for
        ((4, 3), (2, 2), (3, 3), 1),  # more agents than tokens on an axis
    ],
)
def test_forward_is_the_definition(made_for, size, agents, class_tokens) -> None:
    module = make(made_for, agents, class_tokens)
    x = tokens(class_tokens + size[0] * size[1])
    with torch.no_grad():
        got = module(x, size)
        for row, result in zip(x, got, strict=True):
            assert torch.allclose(result, definition(module, row, size), rtol=1e-11, atol=1e-11)


def test_parameters_have_the_published_names_and_shapes() -> None:
    module = AgentAttention(192, 3, map_size=(14, 14), agents=(7, 7))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "an_bias": (3, 49, 7, 7),
        "na_bias": (3, 49, 7, 7),
        "ah_bias": (1, 3, 49, 14, 1),
        "aw_bias": (1, 3, 49, 1, 14),
        "ha_bias": (1, 3, 14, 1, 49),
        "wa_bias": (1, 3, 1, 14, 49),
        "ac_bias": (1, 3, 49, 1),
        "ca_bias": (1, 3, 1, 49),
        "qkv.weight": (576, 192),
        "proj.weight": (192, 192),
        "proj.bias": (192,),
        "dwc.weight": (192, 1, 3, 3),
        "dwc.bias": (192,),
    }
    without = AgentAttention(192, 3, map_size=(14, 14), class_tokens=0)
    assert not {"ac_bias", "ca_bias"} & set(without.state_dict())
    assert 0.01 < module.an_bias.std() < 0.03


def test_gradients_are_right() -> None:
    module = make((3, 4), (2, 2), 1)
    x = tokens(13, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_the_default_map_is_that_of_the_constructor() -> None:
    module, x = make((3, 4), (2, 2), 1), tokens(13)
    assert torch.equal(module(x), module(x, (3, 4)))
    assert not torch.allclose(module(x), module(x, (4, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_to_one_graph(dtype) -> None:
    module, x = make((5, 7), (2, 3), 1).to(dtype), tokens(36).to(dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    compiled(x).sum().backward()


def test_wrong_calls_are_refused() -> None:
    module = make((3, 4), (2, 2), 1)
    with pytest.raises(ValueError, match="dim: wanted a multiple of num_heads, got dim 12 and num_heads 5"):
        AgentAttention(12, 5, map_size=(3, 4))
    with pytest.raises(ValueError, match=r"agents: wanted two numbers .*each at least 1, got \(0, 7\)"):
        AgentAttention(12, 3, map_size=(3, 4), agents=(0, 7))
    with pytest.raises(ValueError, match=r"map_size: wanted two numbers .*got \(3, 0\)"):
        module(tokens(13), (3, 0))
    with pytest.raises(ValueError, match="class_tokens: wanted at least 0, got -1"):
        AgentAttention(12, 3, map_size=(3, 4), class_tokens=-1)
    with pytest.raises(ValueError, match=r"x: wanted \[batch, 13, 12\], got \[2, 12, 12\]; tokens are 1 class tokens"):
        module(tokens(12))


def test_visparse_alone_does_not_import_the_modules() -> None:
    code = "import sys, visparse; print('visparse.nn' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
