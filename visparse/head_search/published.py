"""Sparse-vDiT's published rule: the mode of each head, decided on its own."""

from __future__ import annotations

from collections.abc import Sequence

MODES = ("diagonal", "multi-diagonal", "stripe")


def sparse_vdit(
    mse: Sequence[float], density: Sequence[float], *, weight: float = 0.5, limit: float = 1.0
) -> int | None:
    """Choose the mode of a head.

    ``L_i = MSE(O_i, O_0) + weight * (1 - S_i)`` with S_i the sparsity of mode i; the mode with the least L_i where any
    L_i is at most ``limit``, else dense.

    Args:
        mse: mean squared error of the head's output under each mode but the dense one.
        density: 1 - S_i: visited blocks over all blocks of each mode; 0 for skipping.
        weight: the paper's lambda.
        limit: the paper's epsilon.

    Returns:
        Place of the mode; None for dense.

    Source: Sparse-vDiT, arXiv 2506.03065, section 3.
    """
    losses = [error + weight * share for error, share in zip(mse, density, strict=True)]
    best = min(range(len(losses)), key=lambda i: (losses[i], i))
    return None if losses[best] > limit else best
