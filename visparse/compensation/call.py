"""Call: the arguments of one call of attention, and parts of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
        """Some heads; all of them are not copied. Nothing waits for the device, as it would for a list of indices."""
        if len(heads) == self.q.shape[2]:
            return self
        q, k, v = (torch.stack([x[:, :, head] for head in heads], 2) for x in (self.q, self.k, self.v))
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = torch.stack([bias[:, head] for head in heads], 1)
        return self._replace(q=q, k=k, v=v, bias=bias)


class Served(NamedTuple):
    """What a call gave."""

    out: Tensor  # [B, N, H, D]
    density: Tensor | float | None  # block density of a sparse call, a number or a tensor with one; None: measured
