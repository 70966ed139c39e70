"""Agent attention: a few agent tokens gather from all keys, and all queries read from the agents."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, scaled_dot_product_attention
from torch.nn.init import trunc_normal_

from visparse.nn.multi_head import check_heads, check_tokens, join_heads, split_heads

_COARSE = 7  # side of the coarse map of each learned bias, as published


class AgentAttention(nn.Module):
    """Agent attention over a map of tokens, with linear cost.

    ``softmax(s q A' + B2) (softmax(s A k' + B1) v) + conv(v)``, then the output projection; ``s = head_dim ** -0.5``.
    The agents A are the queries of the map, averaged over a grid of cells. The biases are a coarse 7 x 7 map,
    interpolated to the map of tokens, plus a term for each row and one for each column. ``conv`` is a 3 x 3 convolution
    for each channel. Class tokens come first; they are in no agent and in no convolution, and have biases of their own.

    Names and shapes of the parameters are those of the published code, so that its weights load. Two things are more
    general: maps need not be square, and a map may differ from ``map_size``; the terms of rows and columns are then
    interpolated too. Dropout is left out.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: heads.
        map_size: (height, width) in tokens for which rows and columns have a bias each.
        agents: (rows, columns) of agents. Published: (7, 7) for DeiT-T and S, (9, 9) for B.
        class_tokens: tokens in front of the map; 1 for DeiT, 0 for PVT and Swin.
        qkv_bias: give the projections of queries, keys and values a bias.

    Raises:
        ValueError: dim is no multiple of num_heads, or a size is too small.

    Source: Agent Attention, arXiv 2312.08874, sections 3.2 and 3.3, and its published code for DeiT.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        agents: tuple[int, int] = (7, 7),
        class_tokens: int = 1,
        qkv_bias: bool = False,
    ) -> None:
        """Make the projections, the convolution and the biases."""
        super().__init__()
        check_heads(dim, num_heads)
        _check_pair("map_size", map_size)
        _check_pair("agents", agents)
        if class_tokens < 0:
            raise ValueError(f"class_tokens: wanted at least 0, got {class_tokens}; count the tokens before the map")
        self.dim, self.num_heads, self.map_size = dim, num_heads, map_size
        self.agents, self.class_tokens = agents, class_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        (height, width), count = map_size, agents[0] * agents[1]
        self.an_bias = _bias(num_heads, count, _COARSE, _COARSE)
        self.na_bias = _bias(num_heads, count, _COARSE, _COARSE)
        self.ah_bias = _bias(1, num_heads, count, height, 1)
        self.aw_bias = _bias(1, num_heads, count, 1, width)
        self.ha_bias = _bias(1, num_heads, height, 1, count)
        self.wa_bias = _bias(1, num_heads, 1, width, count)
        self.ac_bias = _bias(1, num_heads, count, class_tokens) if class_tokens else None
        self.ca_bias = _bias(1, num_heads, class_tokens, count) if class_tokens else None

    def forward(self, x: Tensor, map_size: tuple[int, int] | None = None) -> Tensor:
        """Attend.

        Args:
            x: [B, class_tokens + height * width, C], the map row-major.
            map_size: (height, width) in tokens; that of the constructor unless said otherwise.

        Returns:
            [B, class_tokens + height * width, C].

        Raises:
            ValueError: x has another shape, or a side of the map is below 1.
        """
        size = self.map_size if map_size is None else map_size
        _check_pair("map_size", size)
        tokens = self.class_tokens + size[0] * size[1]
        check_tokens("x", x, tokens, self.dim, f"{self.class_tokens} class tokens and height x width {size} of the map")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        pooled = adaptive_avg_pool2d(self._as_map(q, size), self.agents).flatten(2).transpose(1, 2)
        q, k, heads_v, agents = (split_heads(part, self.num_heads) for part in (q, k, v, pooled))
        gathered = scaled_dot_product_attention(agents, k, heads_v, attn_mask=self._to_keys(size).to(x.dtype))
        out = join_heads(scaled_dot_product_attention(q, agents, gathered, attn_mask=self._to_agents(size).to(x.dtype)))
        local = self.dwc(self._as_map(v, size)).flatten(2).transpose(1, 2)
        return self.proj(out + torch.cat([torch.zeros_like(v[:, : self.class_tokens]), local], dim=1))

    def _as_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Turn [B, tokens, C] into a map [B, C, height, width], without class tokens."""
        return x[:, self.class_tokens :].transpose(1, 2).unflatten(2, size)

    def _to_keys(self, size: tuple[int, int]) -> Tensor:
        """Bias of the first softmax, [1, heads, agents, tokens]."""
        return self._bias_of(size, self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, ..., 0, :], self.ac_bias)

    def _to_agents(self, size: tuple[int, int]) -> Tensor:
        """Bias of the second softmax, [1, heads, tokens, agents]."""
        rows, columns = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        alone = None if self.ca_bias is None else self.ca_bias.transpose(2, 3)
        return self._bias_of(size, self.na_bias, rows, columns, alone).transpose(2, 3)

    def _bias_of(
        self, size: tuple[int, int], coarse: Tensor, rows: Tensor, columns: Tensor, alone: Tensor | None
    ) -> Tensor:
        """Put a bias together, [1, heads, agents, tokens].

        Args:
            size: (height, width) of the map.
            coarse: [heads, agents, 7, 7].
            rows: [heads, agents, height for which it was made].
            columns: [heads, agents, width for which it was made].
            alone: [1, heads, agents, class tokens], or None.
        """
        height, width = size
        fine = interpolate(coarse, size=size, mode="bilinear")
        rows = interpolate(rows, size=height, mode="linear")
        columns = interpolate(columns, size=width, mode="linear")
        bias = (fine + rows[..., None] + columns[..., None, :]).flatten(2)[None]
        return bias if alone is None else torch.cat([alone, bias], dim=-1)


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))


def _check_pair(name: str, pair: tuple[int, int]) -> None:
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(
            f"{name}: wanted two numbers (rows, columns), each at least 1, got {pair}; count them in tokens"
        )
