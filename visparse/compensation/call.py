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

    def folded(self) -> Call:
        """The rows of the batch as heads of one row: those of the first row, then those of the second, and on."""
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in self[:3])
        bias = self.bias
        if bias is not None and bias.shape[:2] != (1, 1):
            bias = bias.expand(self.q.shape[0], self.q.shape[2], -1).flatten(0, 1)[None]
        return self._replace(q=q, k=k, v=v, bias=bias)

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


def unfolded(out: Tensor, lse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Undo `Call.folded` for the output [1, N, rows * H, D] and the log-sum-exp [1, rows * H, N] of attention.

    Args:
        out: the output.
        lse: the log-sum-exp.
        rows: of the batch.
    """
    return out[0].unflatten(1, (rows, -1)).transpose(0, 1), lse[0].unflatten(0, (rows, -1))
