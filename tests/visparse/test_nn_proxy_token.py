"""Proxy-token attention equals its definition, written here token by token."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from visparse.nn import ProxyInjection, ProxyTokenAttention, WindowAttention
from visparse.nn.multi_head import MultiHead
from visparse.nn.windows import Windows
from visparse.patterns import ShiftedWindow, Window

Place = tuple[int, int, int]
CASES = [
    ((2, 4, 6), (1, 2, 3)),  # whole windows
    ((3, 5, 7), (2, 2, 3)),  # every axis hangs over
    ((1, 5, 4), (1, 3, 4)),  # a picture, one axis is one window
    ((4, 3, 3), 3),
]


def places(grid: Place) -> list[Place]:
    return list(itertools.product(*(range(length) for length in grid)))


def sides(window: int | Place) -> Place:
    return window if isinstance(window, tuple) else (window, window, window)


def window_of(place: Place, grid: Place, window: int | Place, shifted: bool) -> Place:
    """Number of the window on each axis; a shifted axis begins with a window of half the size."""
    numbers = []
    for at, length, side in zip(place, grid, sides(window), strict=True):
        first = side // 2 if shifted and 1 < side < length else side
        numbers.append(0 if at < first else 1 + (at - first) // side)
    return numbers[0], numbers[1], numbers[2]


def attend(module: MultiHead, query: Tensor, context: Tensor) -> Tensor:
    """One query [C] attends to some tokens [M, C], head by head."""
    q = module.to_q(query)
    k, v = module.to_kv(context).chunk(2, dim=-1)
    width = q.shape[0] // module.num_heads
    heads = []
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.stack([(q[part] * key).sum() / width**0.5 for key in k[:, part]]).exp()
        heads.append((weights[:, None] * v[:, part]).sum(0) / weights.sum())
    return module.to_out(torch.cat(heads))


def injection(module: ProxyInjection, z: Tensor, grid: Place) -> Tensor:
    tokens = places(grid)
    homes = [window_of(place, grid, module.window, shifted=False) for place in tokens]
    proxies = torch.stack(
        [torch.stack([z[i] for i, h in enumerate(homes) if h == home]).mean(0) for home in sorted(set(homes))]
    )
    mixed = torch.stack([attend(module.among_proxies, proxy, proxies) for proxy in proxies])
    return torch.stack([module.injection(attend(module.to_proxies, token, mixed)) for token in z])


def in_windows(module: WindowAttention, z: Tensor, grid: Place) -> Tensor:
    homes = [window_of(place, grid, module.window, module.shifted) for place in places(grid)]
    return torch.stack(
        [
            attend(module.attention, z[i], z[[j for j, h in enumerate(homes) if h == home]])
            for i, home in enumerate(homes)
        ]
    )


def make(window: int | Place, seed: int = 0) -> ProxyTokenAttention:
    """A module in fp64 whose injection is not zero."""
    torch.manual_seed(seed)
    module = ProxyTokenAttention(12, 3, window).double()
    nn.init.normal_(module.injection.injection.weight)
    nn.init.normal_(module.injection.injection.bias)
    return module


def tokens(grid: Place, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, grid[0] * grid[1] * grid[2], 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_forward_is_the_definition(grid, window) -> None:
    module, z = make(window), tokens(grid)
    with torch.no_grad():
        got = module(z, grid)
        for row, result in zip(z, got, strict=True):
            wanted = row + injection(module.injection, row, grid)
            wanted = wanted + in_windows(module.windows, wanted, grid)
            wanted = wanted + in_windows(module.shifted_windows, wanted, grid)
            assert torch.allclose(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_windows_are_those_of_the_patterns(grid, window) -> None:
    coordinates = torch.tensor(places(grid))
    for shifted, pattern in ((False, Window(window=window)), (True, ShiftedWindow(window=window))):
        windows = Windows.of(grid, window, shifted=shifted)
        number = torch.arange(len(coordinates))[None, :, None]
        cut = windows.split(number + 1)[0, :, :, 0]
        home = torch.empty(len(coordinates), dtype=torch.int64)
        for index, row in enumerate(cut):
            home[row[row > 0] - 1] = index
        assert torch.equal(home[:, None] == home, pattern.keep(coordinates, coordinates, grid))
        assert torch.equal(cut > 0, windows.real(torch.device("cpu")))
        assert torch.equal(windows.join(windows.split(number)), number)


def test_injection_begins_as_zero_and_learns() -> None:
    grid = (2, 4, 6)
    torch.manual_seed(0)
    module, z = ProxyTokenAttention(12, 3, (1, 2, 2)).double(), tokens(grid)
    assert torch.equal(z + module.injection(z, grid), z)
    module(z, grid).square().sum().backward()
    assert module.injection.injection.weight.grad.abs().max() > 0
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    assert module.injection(z, grid).abs().max() > 0
    module.injection.reset_injection()
    assert (module.injection(z, grid) == 0).all()


@pytest.mark.parametrize(("grid", "window"), [((2, 4, 2), (1, 2, 2)), ((2, 3, 3), (1, 2, 2))])
def test_gradients_are_right(grid, window) -> None:
    module = make(window)
    z = tokens(grid, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, grid), (z,), fast_mode=True)
    module(z, grid).sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_padding_does_not_leak() -> None:
    grid, module = (3, 5, 7), make((2, 2, 3))
    z = tokens(grid)
    moved = z.clone()
    moved[:, -1] += 1
    shifted = WindowAttention(12, 3, (2, 2, 3), shifted=True).double()
    changed = (shifted(moved, grid) - shifted(z, grid)).abs().amax((0, 2)) > 0
    homes = [window_of(place, grid, (2, 2, 3), shifted=True) for place in places(grid)]
    assert changed.tolist() == [home == homes[-1] for home in homes]
    assert module(z, grid).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_to_one_graph(dtype) -> None:
    grid, module = (3, 5, 7), make((2, 2, 3)).to(dtype)
    z = tokens(grid).to(dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(z, grid), module(z, grid), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    compiled(z, grid).sum().backward()


def test_wrong_calls_are_refused() -> None:
    module = ProxyTokenAttention(12, 3, (1, 2, 2))
    with pytest.raises(ValueError, match="dim: wanted a multiple of num_heads, got dim 12 and num_heads 5"):
        ProxyTokenAttention(12, 5, 2)
    with pytest.raises(TypeError, match=r"window: wanted a whole number or three of them .*got \(2, 2\)"):
        ProxyTokenAttention(12, 3, (2, 2))
    with pytest.raises(ValueError, match="window: wanted at least 1, got 0"):
        WindowAttention(12, 3, 0)
    with pytest.raises(ValueError, match=r"x: wanted \[batch, 12, 12\], got \[2, 10, 12\]; tokens are frames x height"):
        module(torch.zeros(2, 10, 12), (1, 3, 4))
    with pytest.raises(ValueError, match=r"x: wanted \[batch, 12, 12\], got \[12, 12\]"):
        module(torch.zeros(12, 12), (1, 3, 4))
    with pytest.raises(ValueError, match="window: wanted at most 1 on the width axis"):
        module(torch.zeros(1, 4, 12), (1, 4, 1))
    with pytest.raises(ValueError, match=r"grid: wanted \(frames, height, width\), got 2 numbers"):
        module(torch.zeros(1, 4, 12), (2, 2))
