"""`block_scores`: argument checks, choice of the implementation, registration as a PyTorch operator."""

import math
from types import ModuleType

import torch
from torch import Tensor

from visparse_kernels.block_scores import cpu_impl, reference, triton_impl
from visparse_kernels.block_scores.checks import check_arguments, check_parts
from visparse_kernels.block_scores.pooled import pooled_scores
from visparse_kernels.block_scores.slots import sampled_rows
from visparse_kernels.eager import call

# in the order in which "auto" tries them
_CANDIDATES: dict[str, ModuleType] = {"triton": triton_impl, "cpu": cpu_impl, "reference": reference}


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    q_order: Tensor,
    k_order: Tensor,
    block_q: int,
    block_k: int,
    kind: str = "mass",
    sample: int = 1,
    parts: int = 1,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Say how much each key block matters to each query block, by the exact softmax of dense attention.

    With logits ``s_ij = scale * q_i . k_j + bias_j`` and weights ``p_ij = exp(s_ij - lse_i)``, for query block I and
    key block J, over real tokens only; a key whose bias is -inf counts as padding:

    - ``"mass"``: mean over i of sum over j of p_ij. Rows sum to 1 where every key lies in one block.
    - ``"mass_variance"``: mean over i of (sum over j of p_ij) * (variance over j of s_ij, unweighted, of the
      population): what the mean key, a proxy, gets wrong.
    - ``"pooled"``: softmax over J of ``scale * mean(q_i) . mean(k_j) + log(keys in J)``, cheap enough for every step.
      With parts, the softmax is over means of parts of all key blocks, and weights are summed over those of J.

    A block without a real token scores 0. Nothing waits for the device. Never holds an N x N tensor; on a GPU the keys
    are copied into slot order, some heads at a time, at most 512 MiB.

    Sampling takes the first real query of a block and every ``sample``-th after it. It is a fixed lattice: no noise,
    the same at every call, but what only the queries between see is missed, so a structure with a period of a few
    slots is misjudged; for smooth attention it is a mean over fewer queries.

    Args:
        q: [B, Sq, H, D], fp16, bf16 or fp32 (``reference`` and ``"pooled"`` also fp64), any strides.
        k: [B, Sk, H, D], dtype and device of q.
        lse: [B, H, Sq], log-sum-exp of dense attention, natural logarithm; ``"pooled"`` does not read it.
        q_order: int32 [n_q * block_q], slot -> token, -1 padding; the same for all heads.
        k_order: int32 [n_k * block_k], the same for keys.
        block_q: query slots per block.
        block_k: key slots per block.
        kind: ``"mass"``, ``"mass_variance"`` or ``"pooled"``.
        sample: take every ``sample``-th query; a divisor of ``block_q``.
        parts: runs of slots, equally long, that a key block is cut into for pooled scores; ``k_order`` says which keys
            lie together. A divisor of ``block_k``.
        key_bias: [B or 1, H or 1, Sk], added to the scaled logits, as in dense attention; -inf hides a key.
        scale: factor of the logits, positive; None means 1 / sqrt(D).
        impl: ``"reference"``, ``"cpu"``, ``"triton"``, or ``"auto"``: the first of triton, cpu and reference that can
            serve the case. Asked for by name there is no fallback.

    Returns:
        [B, H, n_q, n_k], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape, a device, a size or a name does not fit, or the named implementation cannot serve.
        TypeError: an argument has the wrong dtype.

    Source:
        SparseD (arXiv 2509.24014), selection by exact mass; mass times variance and pooling with log n are ours.
    """
    check_arguments(q, k, lse, q_order, k_order, block_q, block_k, kind, sample, key_bias, scale, impl)
    check_parts(kind, block_k, parts)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_rows, k_rows = sampled_rows(q_order, block_q, sample), k_order.view(-1, block_k)
    if kind == "pooled" or lse is None:
        return pooled_scores(q, k, q_rows, k_rows, key_bias, scale, parts)
    variance = kind == "mass_variance"
    return call(_run, block_scores_op, q, k, lse, q_rows, k_rows, key_bias, scale, variance, impl)


def _run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    variance: bool,
    impl: str,
) -> Tensor:
    """`block_scores` by softmax statistics, as PyTorch's dispatcher and compiler see it."""
    case = (q.device, q.dtype, q.shape[-1], q_rows.shape[1], k_rows.shape[1])
    reasons = {name: module.can_run(*case) for name, module in _CANDIDATES.items()}
    name = next(name for name, reason in reasons.items() if reason is None) if impl == "auto" else impl
    if reasons[name] is not None:
        raise ValueError(f"impl: {name!r} cannot serve this case ({reasons[name]}); choose another or impl='auto'")
    scores: Tensor = _CANDIDATES[name].run(q, k, lse, q_rows, k_rows, key_bias, scale, variance)
    return scores


block_scores_op = torch.library.custom_op("visparse::block_scores", _run, mutates_args=())


@block_scores_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    variance: bool,
    impl: str,
) -> Tensor:
    shape = (q.shape[0], q.shape[2], q_rows.shape[0], k_rows.shape[0])
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
