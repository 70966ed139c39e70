"""Proxy tokens on the CPU: PyTorch's bags of embeddings pool, its flash kernel attends to many query blocks a call.

All query blocks see the same proxies, so keys are not gathered: a call broadcasts them, and a mask of one row for each
query block hides what it sees exactly and holds the weights.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from visparse_kernels.bits import unpack_bits
from visparse_kernels.lists_views import order_of
from visparse_kernels.proxies import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_QUERIES = 1 << 20  # bytes of gathered queries per call; 4 MiB were slower


def cannot_pool(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this implementation cannot pool a case, or None."""
    if device.type != "cpu":
        return f"needs tensors on the CPU, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs fp32, bf16 or fp16, got {dtype}"
    return None


def cannot_attend(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    return cannot_pool(device, dtype)


def pool(k: Tensor, v: Tensor, members: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted means of the keys and of the values of each proxy; see `reference.pool`."""
    if shares is not None:
        return reference.pool(k, v, members, shares)
    real = members >= 0
    tokens = members[real]
    ends = real.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    pooled = [torch.stack([_bags(row, tokens, starts) for row in x]) for x in (k, v)]
    return pooled[0], pooled[1]


def _bags(x: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    """Return the means of bags of rows of x [N, H, D]; sums in fp32."""
    rows = x.reshape(x.shape[0], -1).float()
    return embedding_bag(tokens, rows, starts, mode="mean").view(-1, *x.shape[1:]).to(x.dtype)


def attend(
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
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the proxies group by group; see `visparse_kernels.proxies.api.attend_proxies` for the arguments."""
    batch, _, heads, head_dim = q.shape
    new_out, new_lse = (x.clone(memory_format=torch.contiguous_format) for x in (out, lse))
    added, hidden = weight.expand(batch, heads, -1), hidden.expand(batch, -1, -1, -1)
    members: dict[int, list[int]] = {}
    for head, number in enumerate(head_group.tolist()):
        members.setdefault(number, []).append(head)
    members.pop(-1, None)
    for number, chosen in members.items():
        pick = slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] == len(chosen) - 1 else chosen
        queries, keys, values = q[:, :, pick], pooled_k[:, :, pick], pooled_v[:, :, pick]
        group_out, group_lse = new_out[:, :, pick], new_lse[:, pick]
        blocks = order_of(q_order, number).long().view(-1, block_q)
        step = max(1, _QUERIES // (block_q * len(chosen) * head_dim * q.element_size()))
        for row in range(batch):
            for tokens, words in zip(blocks.split(step), hidden[row, number].split(step), strict=True):
                part, part_lse = _attend_blocks(
                    queries[row], keys[row], values[row], added[row, pick], words, tokens, scale
                )
                _merge_rows(group_out[row], group_lse[row], part, part_lse, tokens)
        new_out[:, :, pick], new_lse[:, pick] = group_out, group_lse
    return new_out, new_lse


def _merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, tokens: Tensor) -> None:
    """Merge attention of some query blocks into the rows of their tokens, in place.

    Args:
        out: [N, H, D], changed.
        lse: [H, N], changed.
        part: [blocks, H, nq, D].
        part_lse: [blocks, H, nq].
        tokens: int64 [blocks, nq], -1 padding.
    """
    at, part, part_lse = tokens.flatten(), part.transpose(1, 2).flatten(0, 1), part_lse.transpose(0, 1).flatten(1)
    real = (at >= 0).nonzero()[:, 0]
    if real.numel() < at.numel():
        at, part, part_lse = at[real], part.index_select(0, real), part_lse.index_select(1, real)
    known = lse.index_select(1, at)
    total = torch.logaddexp(known, part_lse)
    share = (part_lse - total).exp_().masked_fill_(total == -torch.inf, 0.0).t()[..., None]
    merged = torch.lerp(out.index_select(0, at).float(), part.float(), share)
    out.index_copy_(0, at, merged.to(out.dtype))
    lse.index_copy_(1, at, total)


def _attend_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, words: Tensor, tokens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from some query blocks to all proxies that they do not hide.

    Args:
        queries: [N, H, D].
        keys: [P, H, D].
        values: [P, H, D].
        bias: [H, P], weights of the proxies.
        words: int32 [blocks, words], hidden proxies.
        tokens: int64 [blocks, nq], -1 padding, which reads another row.
        scale: factor of the logits.

    Returns:
        ``out [blocks, H, nq, D]`` and ``lse [blocks, H, nq]``; 0 and -inf where all is hidden.
    """
    n_blocks, n_queries = tokens.shape
    at = tokens.clamp(min=0).flatten()
    gathered = queries.index_select(0, at).view(n_blocks, n_queries, *queries.shape[1:]).transpose(1, 2)
    mask = bias.expand(n_blocks, -1, -1).masked_fill(unpack_bits(words)[:, None, : keys.shape[0]], -torch.inf)
    dead = mask.amax(-1, keepdim=True) == -torch.inf
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        gathered,
        keys.transpose(0, 1).expand(n_blocks, -1, -1, -1),
        values.transpose(0, 1).expand(n_blocks, -1, -1, -1),
        attn_mask=mask[:, :, None].expand(-1, -1, n_queries, -1),
        scale=scale,
    )
    if bool(dead.any()):
        out, lse = out.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, -torch.inf)
    return out, lse
