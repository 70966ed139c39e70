"""Proxy-token attention (PT-DiT): proxies of windows are injected into all tokens, then windows do the texture."""

from typing import cast

from torch import Tensor, nn
from torch.nn.init import zeros_

from visparse.layout import Grid, Layout
from visparse.nn.multi_head import MultiHead, check_tokens
from visparse.nn.windows import Windows
from visparse.patterns.lengths import Lengths, check_lengths

_SOURCE = "frames x height x width of the grid"


class ProxyInjection(nn.Module):
    """Global information injection: every token attends to proxies, one per window, that attended to each other.

    A proxy is the mean of the tokens of its window. The last projection begins as zeros, so that the module begins as
    one that changes nothing. Initialise it again if you initialise the weights of your whole model in your own way:
    `reset_injection`.

    Where an axis is no multiple of the window, its last window is cut, and its proxy is the mean of fewer tokens. The
    paper does not say what it does there.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: heads of both attentions.
        window: tokens per proxy, int or (frames, height, width); a single number stands for all axes longer than 1.
        bias: give the projections of queries, keys and values a bias.

    Raises:
        TypeError: the window is not whole numbers.
        ValueError: a window below 1, or dim is no multiple of num_heads.

    Source: PT-DiT, arXiv 2409.04005, section 3.2 (global information injection module).
    """

    def __init__(self, dim: int, num_heads: int, window: Lengths, *, bias: bool = True) -> None:
        """Make the two attentions and the projection that begins as zeros."""
        super().__init__()
        check_lengths("window", window)
        self.dim, self.window = dim, window
        self.among_proxies = MultiHead(dim, num_heads, bias=bias)
        self.to_proxies = MultiHead(dim, num_heads, bias=bias)
        self.injection = nn.Linear(dim, dim)
        self.reset_injection()

    def reset_injection(self) -> None:
        """Set the last projection to zeros."""
        zeros_(self.injection.weight)
        zeros_(self.injection.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return what is to be added to x.

        Args:
            x: [B, tokens, C], row-major.
            grid: (frames, height, width), in tokens.

        Raises:
            ValueError: x has another shape, or the window is longer than an axis.
        """
        windows = _windows(x, grid, self.dim, self.window)
        sums = windows.split(x).sum(2)
        sizes = windows.real(x.device).sum(1, keepdim=True).to(x.dtype)
        proxies = sums / sizes
        return self.injection(self.to_proxies(x, self.among_proxies(proxies, proxies)))


class WindowAttention(nn.Module):
    """Attention inside windows, or inside windows that are shifted by half a window (Swin, in space and time).

    Which pairs see each other is what `visparse.patterns.Window` and `ShiftedWindow` say: nothing is seen across the
    border of the grid, and windows at the border are cut. The paper states neither the shift nor what it does where
    an axis is no multiple of the window. Computed as dense attention of many short sequences, forward and backward:
    that needs no block lists.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: heads.
        window: tokens per window, int or (frames, height, width); a single number stands for all axes longer than 1.
        shifted: shift the windows.
        bias: give the projections of queries, keys and values a bias.

    Raises:
        TypeError: the window is not whole numbers.
        ValueError: a window below 1, or dim is no multiple of num_heads.

    Source: PT-DiT, arXiv 2409.04005, section 3.2 (texture complement module); Swin Transformer, arXiv 2103.14030.
    """

    def __init__(self, dim: int, num_heads: int, window: Lengths, *, shifted: bool = False, bias: bool = True) -> None:
        """Make the attention."""
        super().__init__()
        check_lengths("window", window)
        self.dim, self.window, self.shifted = dim, window, shifted
        self.attention = MultiHead(dim, num_heads, bias=bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return what is to be added to x.

        Args:
            x: [B, tokens, C], row-major.
            grid: (frames, height, width), in tokens.

        Raises:
            ValueError: x has another shape, or the window is longer than an axis.
        """
        windows = _windows(x, grid, self.dim, self.window, shifted=self.shifted)
        parts = windows.split(x)
        mask = None
        if windows.padded:
            mask = windows.real(x.device).repeat(x.shape[0], 1)[:, None, None]
        rows = parts.flatten(0, 1)
        return windows.join(self.attention(rows, rows, mask).unflatten(0, parts.shape[:2]))


class ProxyTokenAttention(nn.Module):
    """The attention of a block of PT-DiT in place of global self-attention: injection, windows, shifted windows.

    ``z = z + injection(z)``, ``z = z + windows(z)``, ``z = z + shifted_windows(z)``. A model with adaptive norms calls
    the three parts itself, each between its scale, shift and gate: they return what is to be added.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: heads of all attentions.
        window: tokens per window and proxy, int or (frames, height, width). Published: (1, 2, 2) at 256 pixels,
            (1, 4, 4) at 512, (1, 8, 8) at 1024, (1, 16, 16) at 2048; 4 frames for video.
        bias: give the projections of queries, keys and values a bias.

    Raises:
        TypeError: the window is not whole numbers.
        ValueError: a window below 1, or dim is no multiple of num_heads.

    Source: PT-DiT, arXiv 2409.04005, section 3.2.
    """

    def __init__(self, dim: int, num_heads: int, window: Lengths, *, bias: bool = True) -> None:
        """Make the three parts."""
        super().__init__()
        self.injection = ProxyInjection(dim, num_heads, window, bias=bias)
        self.windows = WindowAttention(dim, num_heads, window, bias=bias)
        self.shifted_windows = WindowAttention(dim, num_heads, window, shifted=True, bias=bias)

    def forward(self, z: Tensor, grid: Grid) -> Tensor:
        """Return z after the three parts.

        Args:
            z: [B, tokens, C], row-major.
            grid: (frames, height, width), in tokens.

        Returns:
            [B, tokens, C].

        Raises:
            ValueError: z has another shape, or the window is longer than an axis.
        """
        for part in (self.injection, self.windows, self.shifted_windows):
            z = z + cast(Tensor, part(z, grid))
        return z


def _windows(x: Tensor, grid: Grid, dim: int, window: Lengths, *, shifted: bool = False) -> Windows:
    layout = Layout(grid)
    check_tokens("x", x, layout.visual, dim, _SOURCE)
    return Windows.of(layout.grid, window, shifted=shifted)
