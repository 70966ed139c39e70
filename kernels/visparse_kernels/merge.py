"""Merge attention over disjoint key sets by log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention outputs over disjoint sets of keys into the output over their union.

    Args:
        outs: tensors [B, Sq, H, D], one per set of keys, of one shape and dtype.
        lses: tensors [B, H, Sq], their natural log-sum-exp; -inf where a query saw nothing.

    Returns:
        ``out`` like one of ``outs`` and ``lse`` like one of ``lses``; 0 and -inf where no set was seen.

    Raises:
        ValueError: nothing to merge, or the shapes do not fit.

    Source:
        Online softmax normalisation, arXiv 1805.02867, section 3.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs, lses: wanted as many outputs as log-sum-exps, at least one, got {len(outs)} and {len(lses)}; "
            "call attend with return_lse=True for each part"
        )
    batch, q_len, heads, _ = outs[0].shape
    for name, tensors, wanted in (("outs", outs, tuple(outs[0].shape)), ("lses", lses, (batch, heads, q_len))):
        for index, tensor in enumerate(tensors):
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{name}[{index}]: wanted shape {list(wanted)}, got {list(tensor.shape)}; "
                    "outputs are [B, Sq, H, D] and log-sum-exps [B, H, Sq]"
                )
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    weights = (stacked - base).exp().transpose(-1, -2).unsqueeze(-1)
    out = sum((weight * out for weight, out in zip(weights, outs, strict=True)), torch.zeros_like(weights[0]))
    return out.to(outs[0].dtype), lse
