"""Numbers for the masks that a separable pattern has between blocks, found without looking at pairs of tokens."""

import torch
from torch import Tensor

from visparse.distinct import distinct_rows, first_of, scratch
from visparse.patterns.base import Factor
from visparse_kernels.bits import pack_bits


def number_masks(factors: tuple[Factor, ...], q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Number pairs of blocks so that equal numbers mean equal masks.

    Args:
        factors: of the pattern, see `visparse.patterns.base.Pattern.factors`.
        q: int64 [n_q, block_q], row-major indices of the tokens in each query block; -1 is padding.
        k: int64 [n_k, block_k], the same for keys; a multiple of 32 slots.
        rows: int64 [n], query block of each pair.
        cols: int64 [n], its key block.

    Returns:
        int64 [n]. Equal masks may have different numbers; those that one factor empties have the same.
    """
    if not factors:  # everything is kept, so only the padding counts
        factors = (Factor(q.new_zeros(int(max(q.max(), k.max())) + 1), torch.ones(1, 1, dtype=torch.bool)),)
    numbers = torch.stack([_number(factor, q, k, rows, cols) for factor in factors], dim=1)
    numbers = numbers.masked_fill((numbers == 0).any(1, keepdim=True), 0)
    return distinct_rows(numbers)[1]


def _number(factor: Factor, q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Number the masks of one factor: equal numbers are equal masks, 0 is the empty one.

    A mask is a list of rows, and a row depends on the code of its query and on the codes in the key block. So first
    rows are numbered, then lists of numbers of rows.
    """
    code, table = factor.code.to(q.device), factor.table.to(q.device)
    (q_codes, q_kind), (k_codes, k_kind) = (
        distinct_rows(code[side.clamp(min=0)].masked_fill(side < 0, len(table))) for side in (q, k)
    )
    table = torch.nn.functional.pad(table, (0, 1, 0, 1))  # one more code, of padding, which keeps nothing
    per_part = max(1, scratch(q.device) // k_codes.numel())
    words = torch.cat([pack_bits(part[:, k_codes]) for part in table.split(per_part)])
    row = _from_zero(words.flatten(0, 1)).view(len(table), len(k_codes))

    first, index = first_of(q_kind[rows] * len(k_codes) + k_kind[cols])
    masks = [q.new_zeros(0, q.shape[1])]
    own = [q.new_zeros(0)]
    for part in first.split(max(1, scratch(q.device) // q.shape[1])):
        distinct, number = distinct_rows(row[q_codes[q_kind[rows[part]]], k_kind[cols[part]][:, None]])
        own.append(number + sum(len(earlier) for earlier in masks))
        masks.append(distinct)
    return _from_zero(torch.cat(masks))[torch.cat(own)][index]


def _from_zero(rows: Tensor) -> Tensor:
    """Number the distinct rows, int64 [n]; a row of zeros has number 0."""
    return distinct_rows(torch.cat([torch.zeros_like(rows[:1]), rows]))[1][1:] if len(rows) else rows[:, 0].long()
