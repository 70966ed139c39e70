"""Call: the arguments of one call of attention, and parts of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Arguments of one call of attention."""

    q: Tensor  # [B, N, H, D]
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [B or 1, H or 1, N]
    scale: float | None

    def row(self, row: int) -> Call:
        """One row of the batch."""
        part = slice(row, row + 1)
        bias = self.bias if self.bias is None or len(self.bias) == 1 else self.bias[part]
        return self._replace(q=self.q[part], k=self.k[part], v=self.v[part], bias=bias)

    def heads(self, heads: list[int]) -> Call:
        """Some heads; all of them are not copied."""
        if len(heads) == self.q.shape[2]:
            return self
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, heads]
        return self._replace(q=self.q[:, :, heads], k=self.k[:, :, heads], v=self.v[:, :, heads], bias=bias)


class Served(NamedTuple):
    """What a call gave."""

    out: Tensor  # [B, N, H, D]
    density: Tensor | float | None  # block density of a sparse call, a number or a tensor with one; None: measured
