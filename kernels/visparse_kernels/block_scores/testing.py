"""What the tests of `block_scores` share: its definition, written a second time, and random cases."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visparse_kernels.block_scores.api import block_scores
from visparse_kernels.testing import check_close


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of `block_scores`; see there."""

    q: Tensor
    k: Tensor
    lse: Tensor
    q_order: Tensor
    k_order: Tensor
    block_q: int
    block_k: int
    sample: int = 1
    parts: int = 1
    key_bias: Tensor | None = None
    scale: float = 0.125

    def scores(self, kind: str, impl: str = "auto") -> Tensor:
        """Call `block_scores`."""
        return block_scores(
            self.q,
            self.k,
            None if kind == "pooled" else self.lse,
            q_order=self.q_order,
            k_order=self.k_order,
            block_q=self.block_q,
            block_k=self.block_k,
            kind=kind,
            sample=self.sample,
            parts=self.parts,
            key_bias=self.key_bias,
            scale=self.scale,
            impl=impl,
        )


def random_case(
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    heads: int = 2,
    batch: int = 1,
    head_dim: int = 64,
    sample: int = 1,
    parts: int = 1,
    padding: str = "end",
    bias: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spread: float = 1.0,
    seed: int = 0,
) -> Case:
    """Draw a case, with the log-sum-exp of dense attention in fp64, rounded to fp32.

    Args:
        q_len: number of query tokens.
        k_len: number of key tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        heads: number of heads.
        batch: batch size.
        head_dim: size of a head.
        sample: take every ``sample``-th query.
        parts: of each key block, for pooled scores.
        padding: ``"end"``; ``"anywhere"``: shuffled orders with a block more of padding; ``"blocks"``: whole blocks
            of padding, too.
        bias: leading axes of a key bias in which every fifth key is hidden; None: no bias.
        dtype: of q and k.
        device: where the case lives.
        spread: factor of q; large ones make attention peaked.
        seed: of the generator.
    """
    make = torch.Generator().manual_seed(seed)

    def order(length: int, block: int) -> Tensor:
        extra = {"end": 0, "anywhere": 1, "blocks": 2}[padding]
        slots = (-(-length // block) + extra) * block
        table = torch.randperm(slots, generator=make) if padding == "anywhere" else torch.arange(slots)
        if padding == "blocks":
            table = table.roll(block)
        return torch.where(table < length, table, -1).to(torch.int32)

    q = torch.randn(batch, q_len, heads, head_dim, generator=make) * spread
    k = torch.randn(batch, k_len, heads, head_dim, generator=make) + torch.randn(1, 1, heads, head_dim, generator=make)
    key_bias = None
    if bias is not None:
        key_bias = torch.randn(*bias, k_len, generator=make)
        key_bias[..., ::5] = -torch.inf
        key_bias = key_bias.to(device)
    case = Case(
        q=q.to(device, dtype),
        k=k.to(device, dtype),
        lse=torch.zeros(batch, heads, q_len),
        q_order=order(q_len, block_q).to(device),
        k_order=order(k_len, block_k).to(device),
        block_q=block_q,
        block_k=block_k,
        sample=sample,
        parts=parts,
        key_bias=key_bias,
    )
    return replace(case, lse=logits_of(case, torch.float64).logsumexp(-1).float())


def logits_of(case: Case, dtype: torch.dtype) -> Tensor:
    """Compute all logits [B, H, Sq, Sk] in some dtype."""
    q, k = case.q.to(dtype), case.k.to(dtype)
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * case.scale
    return logits if case.key_bias is None else logits + case.key_bias[:, :, None].to(dtype)


def sampled_tokens(case: Case, block: int) -> list[int]:
    """List the queries that stand for a query block: every ``sample``-th real one, from the first on."""
    slots = case.q_order[block * case.block_q : (block + 1) * case.block_q].tolist()
    return [token for token in slots if token >= 0][:: case.sample]


def definition(case: Case, kind: str, dtype: torch.dtype) -> Tensor:
    """Compute the scores as the text defines them, block by block from the whole matrix, in some dtype."""
    logits = logits_of(case, dtype)
    weights = (logits - case.lse[..., None].to(dtype)).exp()
    n_q, n_k = len(case.q_order) // case.block_q, len(case.k_order) // case.block_k
    scores = torch.zeros(*logits.shape[:2], n_q, n_k, dtype=dtype, device=logits.device)
    for i in range(n_q):
        queries = sampled_tokens(case, i)
        for j in range(n_k) if queries else ():
            slots = case.k_order[j * case.block_k : (j + 1) * case.block_k]
            keys = slots[slots >= 0].long()
            mass = weights[:, :, queries][..., keys].sum(-1)
            if kind == "mass_variance":
                mass = mass * _variance(logits[:, :, queries][..., keys])
            scores[:, :, i, j] = mass.mean(-1)
    return scores


def pooled_definition(case: Case, dtype: torch.dtype) -> Tensor:
    """Compute the pooled scores of a case as the text defines them, part by part, in some dtype."""
    q, k = case.q.to(dtype).transpose(1, 2), case.k.to(dtype).transpose(1, 2)
    (batch, heads, k_len, _), n_q, n_k = k.shape, len(case.q_order) // case.block_q, len(case.k_order) // case.block_k
    bias = torch.zeros(1, 1, k_len) if case.key_bias is None else case.key_bias
    amount = bias.to(k.device, dtype).expand(batch, heads, -1).exp()
    runs = [run[run >= 0].long() for run in case.k_order.view(n_k * case.parts, -1)]
    size = torch.stack([amount[:, :, run].sum(-1) for run in runs], 2)
    total = torch.stack([(amount[..., None] * k)[:, :, run].sum(2) for run in runs], 2)
    means = total / torch.where(size > 0, size, 1.0)[..., None]
    scores = torch.zeros(batch, heads, n_q, n_k, dtype=dtype, device=q.device)
    for i in range(n_q):
        queries = sampled_tokens(case, i)
        if queries:
            logits = case.scale * (q[:, :, queries].mean(2)[:, :, None] * means).sum(-1) + size.log()
            scores[:, :, i] = logits.softmax(-1).nan_to_num(nan=0.0).unflatten(2, (n_k, case.parts)).sum(-1)
    return scores


def check_scores(got: Tensor, case: Case, kind: str) -> None:
    """Raise where scores break the error rule: twice the error of eager PyTorch in the same dtype, and a rounding band.

    Args:
        got: [B, H, n_q, n_k], the scores to judge.
        case: their case.
        kind: ``"mass"`` or ``"mass_variance"``.

    Raises:
        AssertionError: names the worst index and both errors.
    """
    wanted, plain = (definition(case, kind, dtype) for dtype in (torch.float64, case.q.dtype))
    if not plain.isfinite().all():  # squares of large logits overflow in fp16
        plain = definition(case, kind, torch.float32)
    check_close("scores [b, h, i, j]", got, wanted, plain, case.q.dtype)


def _variance(logits: Tensor) -> Tensor:
    """Population variance over the last axis of the logits that are not -inf; 0 where there are none."""
    seen = logits > -torch.inf
    count = seen.sum(-1).clamp(min=1)
    mean = torch.where(seen, logits, 0.0).sum(-1) / count
    return torch.where(seen, logits - mean[..., None], 0.0).square().sum(-1) / count
