"""State: what one layer keeps of one branch of a run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visparse.compensation.choice import Choice
from visparse.compensation.config import ReuseStatistics
from visparse.compensation.residual_store import Stored


@dataclass(eq=False)
class BranchState:
    """What is reused in later steps; only ever used for the call that it fits.

    Attributes:
        fits: what a later call must agree in: run, layout, shape, dtype, device and patterns.
        measured: what was measured -> the step that it was measured for.
        choice: tiles that are seen exactly; None where lists come from patterns alone.
        log_rho: fp16 [B, H, N or blocks], log-sum-exp of sparse minus dense attention; None without statistics.
        residual: dense minus sparse output; None without a residual.
        sparse_steps: sparse steps since statistics were measured.
        last_step: the last step that was counted.
    """

    fits: Hashable
    measured: dict[str, int] = field(default_factory=dict)
    choice: Choice | None = None
    log_rho: Tensor | None = None
    residual: Stored | None = None
    sparse_steps: int = 0
    last_step: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without what `attend` derives from the lists."""
        total = 0 if self.residual is None else self.residual.nbytes
        total += 0 if self.log_rho is None else self.log_rho.nbytes
        if self.choice is not None:
            total += self.choice.lists.full_indices.nbytes + self.choice.lists.full_offsets.nbytes
            total += 0 if self.choice.hidden is None else self.choice.hidden.nbytes
        return total


def rho_of(lse: Tensor, dense_lse: Tensor) -> Tensor:
    """Return the logarithm of the share of the denominator that sparse attention sees.

    Args:
        lse: [B, H, N], of sparse attention; -inf where nothing was seen.
        dense_lse: [B, H, N], of dense attention.

    Returns:
        fp32 [B, H, N]; 0 where either is -inf (the output is 0 there in any case).
    """
    log_rho = lse.float() - dense_lse.float()
    return torch.where(log_rho.isfinite(), log_rho, 0.0)


def apply_rho(out: Tensor, log_rho: Tensor, added: float = 0.0, block_of: Tensor | None = None) -> Tensor:
    """Multiply an output by rho.

    Args:
        out: [B, N, H, D].
        log_rho: [B, H, N], or [B, H, blocks] where ``block_of`` is given.
        added: added to rho.
        block_of: int64 [N], block of each token; None: there is a value for each token.

    Returns:
        A new tensor like ``out``.
    """
    rho = log_rho.float().exp()
    if added:
        rho = rho + added
    if block_of is not None:
        rho = rho.index_select(-1, block_of)
    return out * rho.transpose(1, 2).unsqueeze(-1).to(out.dtype)


def block_means(log_rho: Tensor, block_of: Tensor, blocks: int) -> Tensor:
    """Average log_rho over blocks of queries.

    Args:
        log_rho: fp32 [B, H, N].
        block_of: int64 [N], block of each token.
        blocks: number of blocks.

    Returns:
        fp32 [B, H, blocks]; 0 for a block without tokens.
    """
    total = log_rho.new_zeros(*log_rho.shape[:2], blocks).index_add_(-1, block_of, log_rho)
    count = torch.bincount(block_of, minlength=blocks).clamp(min=1)
    return total / count


def ramp(statistics: ReuseStatistics, state: BranchState, step: int) -> float:
    """What is added to rho at a sparse step: `ramp` for each sparse step before it.

    Args:
        statistics: of the plan.
        state: of the layer and branch; its count goes on with the step.
        step: of the run.
    """
    if state.last_step is not None and step != state.last_step:
        state.sparse_steps += 1
    state.last_step = step
    return statistics.ramp * state.sparse_steps
