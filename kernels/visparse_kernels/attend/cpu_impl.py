"""`attend` on the CPU: gather the kept keys of a query block, one SDPA call for the block.

Only the keys that a query block visits are gathered, and no padding, so the work is that of the visited blocks.
PyTorch's CPU flash kernel does the mathematics and returns the log-sum-exp; a mask is made only where a block needs it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits
from visparse_kernels.lists import BlockLists
from visparse_kernels.lists_views import order_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Compute attention query block by query block; the batch and the heads of a group share each call.

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
    ends = lists.full_offsets.tolist(), lists.partial_offsets.tolist()
    for number, chosen in members.items():
        pick = slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] == len(chosen) - 1 else chosen
        group = _Group(lists, number, None if key_bias is None else key_bias.expand(-1, heads, -1)[:, pick])
        queries, keys, values = q[:, :, pick], k[:, :, pick], v[:, :, pick]
        group_out, group_lse = torch.zeros_like(queries), lse[:, pick].clone()
        for block in range(lists.n_q):
            row = number * lists.n_q + block
            full, partial = (slice(end[row], end[row + 1]) for end in ends)
            tokens, seen, mask, dead = group.visit(block, full, partial)
            if not seen.numel():
                continue
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _gather(queries, tokens), _gather(keys, seen), _gather(values, seen), attn_mask=mask, scale=scale
            )
            if dead is not None:
                part = part.masked_fill(dead[..., None], 0.0)
                part_lse = part_lse.masked_fill(dead, -torch.inf)
            group_out[:, tokens] = part.transpose(1, 2)
            group_lse[:, :, tokens] = part_lse
        out[:, :, pick] = group_out
        lse[:, pick] = group_lse
    return out, lse


@dataclass
class _Group:
    """The lists of one group of heads, ready to say what a query block sees."""

    lists: BlockLists
    number: int
    bias: Tensor | None

    def __post_init__(self) -> None:
        lists = self.lists
        self.q_order = order_of(lists.q_order, self.number).long().view(lists.n_q, lists.block_q)
        self.k_order = order_of(lists.k_order, self.number).long().view(lists.n_k, lists.block_k)
        self.q_padded = (self.q_order < 0).any(1).tolist()
        self.k_real = self.k_order >= 0
        self.k_padded = not bool(self.k_real.all())
        self.tiles = lists.tiles.view(torch.int16)
        self.real_bits = pack_bits(self.k_real).view(torch.int16)

    def visit(self, block: int, full: slice, partial: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what one query block sees.

        Args:
            block: the query block.
            full: its entries in ``full_indices``.
            partial: its entries in ``partial_indices``.

        Returns:
            ``tokens [nq]``, its query tokens; ``seen [nk]``, the key tokens of the blocks it visits; ``mask``
            broadcastable to [B, H, nq, nk], added to the logits, or None; ``dead`` broadcastable to [B, H, nq], the
            queries that see nothing, or None where there can be none.
        """
        tokens, q_real = self.q_order[block], None
        if self.q_padded[block]:
            q_real = tokens >= 0
            tokens = tokens[q_real]
        full_keys = self._tokens(self.lists.full_indices[full])
        columns = self.lists.partial_indices[partial]
        if not columns.shape[0]:
            return tokens, full_keys, *self._bias_only(full_keys, tokens.shape[0])
        words = self.tiles[self.lists.partial_tiles[partial]]
        if self.k_padded:
            words = words & self.real_bits[columns][:, None]
        words = words.transpose(0, 1) if q_real is None else words[:, q_real].transpose(0, 1)
        masked = _to_additive(words)
        if self.k_padded:
            masked = masked[:, self.k_real[columns].flatten()]
        mask = masked.new_zeros(tokens.shape[0], full_keys.shape[0] + masked.shape[1])
        mask[:, full_keys.shape[0] :] = masked
        seen = torch.cat([full_keys, self._tokens(columns)])
        if self.bias is not None:
            biased = mask + self.bias[:, :, None, seen].float()
            return tokens, seen, biased, biased.amax(-1) == -torch.inf
        dead = None if full_keys.shape[0] else (words == 0).flatten(1).all(1)
        return tokens, seen, mask[None, None], dead

    def _tokens(self, blocks: Tensor) -> Tensor:
        tokens = self.k_order.index_select(0, blocks).flatten()
        return tokens[tokens >= 0] if self.k_padded else tokens

    def _bias_only(self, seen: Tensor, n_queries: int) -> tuple[Tensor | None, Tensor | None]:
        if self.bias is None or not seen.shape[0]:
            return None, None
        bias = self.bias[:, :, None, seen].float()
        return bias.expand(-1, -1, n_queries, -1), bias.amax(-1) == -torch.inf


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    return x.index_select(1, tokens).transpose(1, 2)


def _to_additive(words: Tensor) -> Tensor:
    """Expand 16-bit words [n, blocks, words] to an additive mask [n, blocks * words * 16]: 0 keeps, -inf hides."""
    index = words.to(torch.int32).bitwise_and_(0xFFFF).flatten()
    return _additive_table().index_select(0, index).view(words.shape[0], -1)


@cache
def _additive_table() -> Tensor:
    """Return the additive mask of every 16-bit word, fp32 [65536, 16], 4 MiB."""
    bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
    return torch.where(bits.bool(), 0.0, -torch.inf)
