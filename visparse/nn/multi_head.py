"""Multi-head attention between two sequences, the part that the modules share."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class MultiHead(nn.Module):
    """Attention of one sequence to another, or to itself, with projections of queries, keys, values and output.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: heads.
        bias: give the projections of queries, keys and values a bias; that of the output has one always.

    Raises:
        ValueError: dim is no multiple of num_heads.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True) -> None:
        """Make the projections."""
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x attend to context.

        Args:
            x: [B, N, C], the queries.
            context: [B, M, C], the keys and values.
            mask: bool, broadcasts to [B, heads, N, M]; False hides a pair. None hides nothing.

        Returns:
            [B, N, C].
        """
        q = split_heads(self.to_q(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.to_kv(context).chunk(2, dim=-1))
        return self.to_out(join_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Turn [B, N, C] into [B, heads, N, C / heads]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Turn [B, heads, N, C / heads] into [B, N, C]."""
    return x.transpose(1, 2).flatten(2)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError where the channels cannot be dealt out to the heads."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(
            f"dim: wanted a multiple of num_heads, got dim {dim} and num_heads {num_heads}; change one of them"
        )


def check_tokens(name: str, x: Tensor, tokens: int, dim: int, why: str) -> None:
    """Raise ValueError where x is not [B, tokens, dim].

    Args:
        name: of x, for the error text.
        x: the tensor.
        tokens: how many are wanted.
        dim: channels that are wanted.
        why: where the number of tokens comes from, for the error text.
    """
    if x.ndim != 3 or x.shape[1:] != torch.Size((tokens, dim)):
        raise ValueError(
            f"{name}: wanted [batch, {tokens}, {dim}], got {list(x.shape)}; tokens are {why}, channels are dim"
        )
