"""Bit masks in int32 words, and the plain order table."""

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask into int32 words along its last axis.

    Args:
        mask: bool [..., n], n a multiple of 32.

    Returns:
        int32 [..., n / 32]; bit j of word w is ``mask[..., 32 * w + j]``.

    Raises:
        ValueError: the last axis is not a multiple of 32.
    """
    if mask.shape[-1] % 32:
        raise ValueError(f"mask: the last axis must be a multiple of 32, got {mask.shape[-1]}; pad it with False")
    bits = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 32, 32).to(torch.int64)
    words = (bits << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """Undo `pack_bits`.

    Args:
        words: int32 [..., n / 32].

    Returns:
        bool [..., n].
    """
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.reshape(*words.shape[:-1], words.shape[-1] * 32).bool()


def identity_order(length: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Return the order table that keeps tokens where they are.

    Args:
        length: number of tokens.
        block: block size in slots.
        device: where the table lives.

    Returns:
        int32 [1, ceil(length / block) * block]: 0, 1, ..., length - 1, then -1.
    """
    slots = -(-length // block) * block
    order = torch.arange(slots, dtype=torch.int32, device=device)
    return torch.where(order < length, order, -1)[None]
