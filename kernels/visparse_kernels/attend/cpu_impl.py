"""`attend` on the CPU: gather the kept keys of query blocks, then one SDPA call for many blocks of equal size.

Only the keys that a query block visits are gathered, so the work is that of the visited blocks. PyTorch's CPU flash
kernel does the mathematics and returns the log-sum-exp; a mask is made only where a block needs one. Query blocks that
see equally many keys share a call: few large calls lose less to waiting threads, above all on a busy machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits
from visparse_kernels.lists import BlockLists
from visparse_kernels.lists_views import order_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GATHERED = 4 << 20  # bytes of gathered keys and values per call; 1 to 8 MiB were equally fast


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if device.type != "cpu":
        return f"needs tensors on the CPU, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs fp32, bf16 or fp16, got {dtype}"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute attention group by group; the heads of a group and many query blocks share each call.

    See `visparse_kernels.attend` for the arguments.

    Returns:
        ``out [B, Sq, H, D]`` in the dtype of q, and ``lse [B, H, Sq]`` fp32.
    """
    batch, q_len, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=torch.float32)
    members: dict[int, list[int]] = {}
    for head, number in enumerate(lists.head_group.tolist()):
        members.setdefault(number, []).append(head)
    members.pop(-1, None)
    bias = None if key_bias is None else key_bias.float().expand(batch, heads, -1)
    for number, chosen in members.items():
        pick = slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] == len(chosen) - 1 else chosen
        queries, keys, values = q[:, :, pick], k[:, :, pick], v[:, :, pick]
        group_out, group_lse = torch.zeros_like(queries), lse[:, pick].clone()
        per_key = 2 * len(chosen) * q.shape[-1] * q.element_size()
        for part in _parts(lists, number, _GATHERED // per_key):
            for row in range(batch):
                mask, dead = part.mask(None if bias is None else bias[row, pick])
                part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    _gather(queries[row], part.tokens),
                    _gather(keys[row], part.seen),
                    _gather(values[row], part.seen),
                    attn_mask=mask,
                    scale=scale,
                )
                if dead is not None:
                    part_out = part_out.masked_fill(dead[..., None], 0.0)
                    part_lse = part_lse.masked_fill(dead, -torch.inf)
                at = part.tokens.flatten()
                group_out[row, at] = part_out.transpose(1, 2).flatten(0, 1)
                group_lse[row, :, at] = part_lse.transpose(0, 1).flatten(1)
        out[:, :, pick] = group_out
        lse[:, pick] = group_lse
    return out, lse


@dataclass
class _Part:
    """Query blocks of one group that have equally many queries and see equally many keys.

    Args:
        tokens: int64 [blocks, nq], the query tokens.
        seen: int64 [blocks, nk], the key tokens that they visit, those of full blocks first.
        words: int16 [blocks, nq, masked keys / 16], masks of the last keys.
    """

    tokens: Tensor
    seen: Tensor
    words: Tensor

    def mask(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what is added to the logits, and which queries see nothing; None where nothing is, or none do.

        Args:
            bias: fp32 [H, Sk], or None.

        Returns:
            ``mask [blocks, H or 1, nq, nk]`` and ``dead [blocks, H or 1, nq]``.
        """
        (blocks, n_queries), n_keys = self.tokens.shape, self.seen.shape[1]
        n_full = n_keys - self.words.shape[2] * 16
        mask = None
        if n_full < n_keys:
            mask = torch.zeros(blocks, 1, n_queries, n_keys)
            mask[:, 0, :, n_full:] = _to_additive(self.words)
        if bias is not None:
            added = bias[:, self.seen].transpose(0, 1)[:, :, None]
            mask = added.expand(-1, -1, n_queries, -1) if mask is None else mask + added
            return mask, mask.amax(-1) == -torch.inf
        dead = None if n_full else (self.words == 0).all(-1)[:, None]
        return mask, dead


def _parts(lists: BlockLists, group: int, limit: int) -> Iterator[_Part]:
    """Sort the query blocks of a group into parts that gather at most ``limit`` keys, or are one block."""
    q_order = order_of(lists.q_order, group).long().view(lists.n_q, lists.block_q)
    k_order = order_of(lists.k_order, group).long().view(lists.n_k, lists.block_k)
    if len(lists.partial_indices) == 0:
        yield from _full_parts(lists, group, q_order, k_order, limit)
        return
    k_real = k_order >= 0
    real_bits = pack_bits(k_real).view(torch.int16)
    # under a mask a padding slot repeats a token of its own block, so nothing else can leak in
    k_filled = torch.where(k_real, k_order, k_order.amax(1, keepdim=True))
    # flattened first: an empty table may have strides that `view` refuses
    tiles = lists.tiles.flatten().view(torch.int16).view(-1, lists.block_q, lists.block_k // 16)
    ends = [offsets.tolist() for offsets in (lists.full_offsets, lists.partial_offsets)]

    alike: dict[tuple[int, int, int], list[tuple[Tensor, ...]]] = {}
    for block in range(lists.n_q):
        full, partial = (slice(end[group * lists.n_q + block], end[group * lists.n_q + block + 1]) for end in ends)
        q_slots = (q_order[block] >= 0).nonzero()[:, 0]
        full_keys = k_order[lists.full_indices[full]].flatten()
        full_keys = full_keys[full_keys >= 0]
        columns, tile = lists.partial_indices[partial], lists.partial_tiles[partial]
        alive = k_real[columns].any(1)
        columns, tile = columns[alive], tile[alive]
        seen = torch.cat([full_keys, k_filled[columns].flatten()])
        if q_slots.numel() and seen.numel():
            size = (q_slots.numel(), full_keys.numel(), columns.numel())
            alike.setdefault(size, []).append((q_order[block, q_slots], seen, q_slots, columns, tile))
    for items in alike.values():
        step = max(1, limit // items[0][1].numel())
        for first in range(0, len(items), step):
            tokens, seen, slots, columns, tile = map(torch.stack, zip(*items[first : first + step], strict=True))
            words = tiles[tile[:, None], slots[:, :, None]] & real_bits[columns][:, None]
            yield _Part(tokens, seen, words.flatten(2))


def _full_parts(lists: BlockLists, group: int, q_order: Tensor, k_order: Tensor, limit: int) -> Iterator[_Part]:
    """`_parts` of lists without masks, as choices by content are: all query blocks of a size at once.

    Args:
        lists: without masked blocks.
        group: whose blocks.
        q_order: int64 [n_q, block_q], its query tokens.
        k_order: int64 [n_k, block_k], its key tokens.
        limit: keys of a part.
    """
    offsets = lists.full_offsets[group * lists.n_q : (group + 1) * lists.n_q + 1].long()
    blocks = lists.full_indices[int(offsets[0]) : int(offsets[-1])]
    offsets = offsets - offsets[0]
    keys_until = torch.nn.functional.pad((k_order >= 0).sum(1)[blocks].cumsum(0), (1, 0))
    sizes = torch.stack([(q_order >= 0).sum(1), offsets.diff(), keys_until[offsets].diff()], 1)
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, size in enumerate(sizes.tolist()):
        alike.setdefault(tuple(size), []).append(row)
    for (n_queries, count, n_keys), rows in alike.items():
        step = max(1, limit // max(n_keys, 1))
        for first in range(0, len(rows) if n_queries and n_keys else 0, step):
            some = torch.tensor(rows[first : first + step])
            tokens, visited = q_order[some], offsets[some][:, None] + torch.arange(count)
            seen = k_order[blocks[visited]].flatten(1)
            tokens, seen = (
                x if x.shape[1] == width else x[x >= 0].view(len(some), width)
                for x, width in ((tokens, n_queries), (seen, n_keys))
            )
            yield _Part(tokens, seen, torch.zeros(len(some), n_queries, 0, dtype=torch.int16))


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """Gather rows of x [S, H, D] by tokens [blocks, n] to [blocks, H, n, D]."""
    return x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:]).transpose(1, 2)


def _to_additive(words: Tensor) -> Tensor:
    """Expand 16-bit words [..., n] to an additive fp32 mask [..., 16 * n]: 0 keeps, -inf hides."""
    index = words.to(torch.int32).bitwise_and_(0xFFFF).flatten()
    return _additive_table().index_select(0, index).view(*words.shape[:-1], -1)


@cache
def _additive_table() -> Tensor:
    """Return the additive mask of every 16-bit word, fp32 [65536, 16], 4 MiB."""
    bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
    return torch.where(bits.bool(), 0.0, -torch.inf)
