"""`pool_tokens` and `attend_proxies`: argument checks, choice of the implementation, registration as operators."""

import math
from types import ModuleType

import torch
from torch import Tensor

from visparse_kernels import env
from visparse_kernels.eager import call
from visparse_kernels.proxies import cpu_impl, reference, triton_impl
from visparse_kernels.proxies.checks import check_attend, check_pool
from visparse_kernels.proxies.means import agent_logits, bias_of, plain_weights, shares_of, weights_of

# in the order in which "auto" tries them
_CANDIDATES: dict[str, ModuleType] = {"triton": triton_impl, "cpu": cpu_impl, "reference": reference}


def pool_tokens(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    *,
    key_bias: Tensor | None = None,
    query: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Make proxy tokens: one key and one value for each set of tokens, and what is added to the proxy's logit.

    Key and value are means over the members, summed in fp32, and the weight is the logarithm of their number. With
    ``key_bias`` the mean is weighted by exp(bias), and the weight is the log-sum-exp of the biases; a member that is
    hidden by -inf counts for nothing, whatever it holds, and a proxy of hidden members has zeros and the weight -inf.
    With ``query`` the members are weighted by the softmax of bias + scale * (mean query of the tile . key): the mean
    query, itself weighted by exp(bias), is an agent that gathers the tile; the weight of the proxy is the same as
    without. Inference only; any strides.

    Args:
        k: [B, N, H, D], fp16, bf16 or fp32 (``reference`` also fp64); D a multiple of 8 up to 256.
        v: [B, N, H, D], dtype and device of k.
        members: int32 [P, m], the tokens of each proxy, at least one, -1 padding.
        key_bias: [B or 1, H or 1, N], any float dtype, added to the logits of `attend`; -inf hides a key.
        query: [B, N, H, D], dtype and device of k; makes agents of the tiles.
        counts: int or float [P], positive: how many tokens each proxy stands for, if not for its members alone. With
            ``key_bias`` they count with the mean of exp(bias) over the members.
        scale: factor of the agents' logits, positive; None means 1 / sqrt(D).
        impl: ``"reference"``, ``"cpu"``, ``"triton"``, or ``"auto"``: what the variable VISPARSE_IMPL names ("gluon"
            means "triton" here), else the first of triton, cpu and reference that can serve the case.

    Returns:
        ``pooled_k`` and ``pooled_v [B, P, H, D]``, dtype of k, and ``weight [B or 1, H or 1, P]``, fp32 (fp64 for
        fp64 inputs); its first axes are those of ``key_bias``.

    Raises:
        ValueError: shapes, devices or sizes do not fit; an input requires grad; or no implementation serves the case.
        TypeError: an argument has the wrong type or dtype.

    Source:
        Weighted coarse keys: LLSA, arXiv 2512.16615. Agents: Agent Attention, arXiv 2312.08874, section 3.
    """
    check_pool(k, v, members, key_bias, query, counts, scale, impl)
    scale = 1.0 / math.sqrt(k.shape[-1]) if scale is None else scale
    return call(_pool, pool_tokens_op, k, v, members, key_bias, query, counts, scale, impl)


def attend_proxies(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    *,
    out_order: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every query attend to the proxies that are not hidden, and merge them into what it has seen exactly.

    The softmax then runs over the keys that `attend` visited and over the proxies, whose logits are scale * q . k +
    weight. Inference only; any strides; the arguments are not changed. A query that sees nothing gives 0 and -inf. A
    non-finite key or value of a proxy may reach every query, hidden or not.

    Args:
        q: [B, Sq, H, D], fp16, bf16 or fp32 (``reference`` also fp64); D a multiple of 8 up to 256.
        out: [B, Sq, H, D], dtype and device of q: the exact part, of `attend`; finite, 0 where nothing was seen.
        lse: [B, H, Sq], fp32 (fp64 beside fp64), its log-sum-exp, natural logarithm.
        pooled_k: [B, P, H, D], keys of `pool_tokens`.
        pooled_v: [B, P, H, D], values of `pool_tokens`.
        weight: [B or 1, H or 1, P], fp32 (fp64 beside fp64), added to the logits; -inf hides a proxy.
        hidden: int32 [B or 1, G, n_q, ceil(P / 32)], G may be 0: bit p % 32 of word p // 32 is 1 where the query block
            does not attend to proxy p, since it sees the tile exactly. Bits behind the last proxy mean nothing.
        head_group: int32 [H], group of each head below G; -1 leaves the head as it is.
        q_order: int32 [G or 1, n_q * block_q], slot -> token, -1 padding; every token in exactly one slot.
        block_q: query slots per block; ``triton`` needs a multiple of 16.
        out_order: int32 [1, n_q * block_q], padding where ``q_order`` has it: the place in the result of the query in
            each slot, every place in exactly one slot; ``q_order`` must have one row then. None: the query's own place.
        scale: factor of the logits, positive; None means 1 / sqrt(D).
        impl: as in `pool_tokens`.

    Returns:
        ``out [B, Sq, H, D]``, contiguous, dtype of q, and ``lse [B, H, Sq]``, dtype of ``lse``.

    Raises:
        ValueError: shapes, devices or sizes do not fit; an input requires grad; or no implementation serves the case.
        TypeError: an argument has the wrong type or dtype.

    Source:
        Merging by log-sum-exp: online softmax normalisation, arXiv 1805.02867, section 3. Coarse keys with the weight
        of their size: LLSA, arXiv 2512.16615; here without those that the query sees exactly.
    """
    check_attend(q, out, lse, pooled_k, pooled_v, weight, hidden, head_group, q_order, block_q, out_order, scale, impl)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    tables = (hidden, head_group, q_order, block_q, out_order, scale, impl)
    return call(_attend, attend_proxies_op, q, out, lse, pooled_k, pooled_v, weight, *tables)


def _choose(impl: str, reasons: dict[str, str | None]) -> ModuleType:
    """Return the implementation to use, from why each candidate cannot serve the case, or None."""
    name = env.impl_from_env() if impl == "auto" else impl
    if name == "auto":
        return next(_CANDIDATES[candidate] for candidate, reason in reasons.items() if reason is None)
    name = "triton" if name == "gluon" else name
    if reasons[name] is not None:
        every = "; ".join(f"{n}: {reason or 'can serve this case'}" for n, reason in reasons.items())
        raise ValueError(f"impl: {name!r} cannot serve this case; choose another or impl='auto' ({every})")
    return _CANDIDATES[name]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pool(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    key_bias: Tensor | None,
    query: Tensor | None,
    counts: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pool_tokens` in tensors and numbers, as PyTorch's dispatcher and compiler see it."""
    chosen = _choose(impl, {name: module.cannot_pool(k.device, k.dtype) for name, module in _CANDIDATES.items()})
    dtype = torch.promote_types(k.dtype, torch.float32)
    if key_bias is None and query is None:
        shares, weight = None, plain_weights(members, counts, dtype)
    else:
        bias = bias_of(members, key_bias, dtype)
        shares, weight = shares_of(bias), weights_of(members, bias, counts)
    if query is not None and shares is not None:
        shares = shares_of(bias + agent_logits(k, query, members, shares, scale))
    pooled_k, pooled_v = chosen.pool(_unit_stride(k), _unit_stride(v), members, shares)
    return pooled_k, pooled_v, weight


def _attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    out_order: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`attend_proxies` in tensors and numbers, as PyTorch's dispatcher and compiler see it."""
    case = (q.device, q.dtype, q.shape[-1], block_q)
    chosen = _choose(impl, {name: module.cannot_attend(*case) for name, module in _CANDIDATES.items()})
    if hidden.shape[1] == 0:  # no group: every head is skipped, and a kernel would find no table to read
        out, lse = (x.clone(memory_format=torch.contiguous_format) for x in (out, lse))
        return (out, lse) if out_order is None else reference.put_in_order(out, lse, q_order, out_order)
    q, out, pooled_k, pooled_v = map(_unit_stride, (q, out, pooled_k, pooled_v))
    tables = (hidden, head_group, q_order, block_q, scale)
    if chosen is triton_impl:
        result: tuple[Tensor, Tensor] = triton_impl.attend(
            q, out, lse, pooled_k, pooled_v, weight, *tables, out_order=out_order
        )
        return result
    result = chosen.attend(q, out, lse, pooled_k, pooled_v, weight, *tables)
    return result if out_order is None else reference.put_in_order(*result, q_order, out_order)


pool_tokens_op = torch.library.custom_op("visparse::pool_tokens", _pool, mutates_args=())


@pool_tokens_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    key_bias: Tensor | None,
    query: Tensor | None,
    counts: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = k.shape
    shape = (batch, members.shape[0], heads, head_dim)
    axes = (1, 1) if key_bias is None else key_bias.shape[:2]
    dtype = torch.promote_types(k.dtype, torch.float32)
    return k.new_empty(shape), v.new_empty(shape), k.new_empty((*axes, members.shape[0]), dtype=dtype)


attend_proxies_op = torch.library.custom_op("visparse::attend_proxies", _attend, mutates_args=())


@attend_proxies_op.register_fake
def _(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    weight: Tensor,
    hidden: Tensor,
    head_group: Tensor,
    q_order: Tensor,
    block_q: int,
    out_order: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), lse.new_empty(lse.shape)
