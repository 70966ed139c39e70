"""Oracles, the error rule, random block lists and broken variants: what the tests of every implementation share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from visparse_kernels.attend import reference
from visparse_kernels.bits import pack_bits
from visparse_kernels.lists import BlockLists
from visparse_kernels.lists_views import token_mask


def check_attend(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> None:
    """Raise where a result of `attend` breaks the error rule, on the output or on the log-sum-exp.

    Args:
        out: [B, Sq, H, D], the output to judge.
        lse: [B, H, Sq], its log-sum-exp.
        q: [B, Sq, H, D], the inputs.
        k: [B, Sk, H, D].
        v: [B, Sk, H, D].
        lists: the block lists.
        scale: as given to `attend`.
        key_bias: as given to `attend`.

    Raises:
        AssertionError: names the worst index and both errors.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wanted, wanted_lse = reference.run(q.double(), k.double(), v.double(), lists, scale, key_bias)
    plain, plain_lse = eager(q, k, v, token_mask(lists), scale, key_bias)
    check_close("out [b, s, h, d]", out, wanted, plain, q.dtype)
    check_close("lse [b, h, s]", lse, wanted_lse, plain_lse, q.dtype)


def error_budget(wanted: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error that the rule allows: 2 * (error of eager PyTorch + one rounding band).

    Args:
        wanted: fp64, the truth.
        plain: the same shape, from eager PyTorch in ``dtype``.
        dtype: dtype of the inputs; the band is its epsilon times the largest finite value of ``wanted``.
    """
    finite = torch.isfinite(wanted)
    if not bool(finite.any()):
        return 0.0
    eager_error = (plain.double() - wanted)[finite].abs().max()
    band = torch.finfo(dtype).eps * wanted[finite].abs().max()
    return float(2 * (eager_error + band))


def check_close(name: str, got: Tensor, wanted: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Raise where ``got`` is further from ``wanted`` than `error_budget` allows, or not finite where it must be.

    Args:
        name: name of the tensor and of its axes, for the message.
        got: the tensor to judge.
        wanted: fp64, the truth; -inf is compared exactly.
        plain: from eager PyTorch in ``dtype``.
        dtype: dtype of the inputs.

    Raises:
        AssertionError: names the worst index, the values and both errors.
    """
    if got.shape != wanted.shape:
        raise AssertionError(f"{name}: wanted shape {list(wanted.shape)}, got {list(got.shape)}")
    budget = error_budget(wanted, plain, dtype)
    error = (got.double() - wanted).abs()
    error = torch.where(got.double() == wanted, 0.0, error).nan_to_num(nan=torch.inf, posinf=torch.inf)
    worst = float(error.max()) if error.numel() else 0.0
    if worst <= budget:
        return
    index = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    at = tuple(index)
    raise AssertionError(
        f"{name}: worst at {index}: got {got[at].item():.6g}, wanted {wanted[at].item():.6g}, "
        f"eager {plain[at].item():.6g}; error {worst:.3g}, allowed {budget:.3g} "
        f"({int((error > budget).sum())} of {error.numel()} elements are out)"
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute masked attention as plain PyTorch would, in the dtype of the inputs.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, H, D].
        v: [B, Sk, H, D].
        mask: bool [H, Sq, Sk].
        scale: factor of the logits.
        key_bias: [B or 1, H or 1, Sk], or None.

    Returns:
        ``out [B, Sq, H, D]`` and ``lse [B, H, Sq]``; 0 and -inf where nothing is seen.
    """
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale
    if key_bias is not None:
        logits = logits + key_bias[:, :, None].to(q.dtype)
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(nan=0.0)
    return (weights @ v.transpose(1, 2)).transpose(1, 2), logits.float().logsumexp(-1)


def random_lists(
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    head_group: list[int],
    keep: float = 0.4,
    partial: float = 0.5,
    shuffled: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> BlockLists:
    """Make random lists: full and masked blocks, some empty rows, and, where asked, orders with scattered padding.

    Args:
        q_len: number of query tokens.
        k_len: number of key tokens.
        block_q: query slots per block.
        block_k: key slots per block.
        head_group: group of each head, -1 for a skipped head.
        keep: share of blocks that are visited.
        partial: share of these that have a mask.
        shuffled: give every group orders of its own, shuffled, with padding anywhere.
        seed: of the generator.
        device: where the lists live.
    """
    make = torch.Generator().manual_seed(seed)
    groups = max(head_group) + 1
    extra = 1 if shuffled else 0
    n_q, n_k = -(-q_len // block_q) + extra, -(-k_len // block_k) + extra
    kept = torch.rand(groups * n_q, n_k, generator=make) < keep
    rows, cols = kept.nonzero(as_tuple=True)
    tiles = torch.randint(-(2**31), 2**31, (7, block_q, block_k // 32), generator=make).to(torch.int32)
    masked = torch.rand(rows.shape[0], generator=make) < partial
    tile = torch.where(masked, torch.randint(0, 7, rows.shape, generator=make), -1)
    lists = BlockLists.from_entries(
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.tensor(head_group),
        q_order=_shuffled_orders(q_len, n_q * block_q, groups, make) if shuffled else None,
        k_order=_shuffled_orders(k_len, n_k * block_k, groups, make) if shuffled else None,
        rows=rows,
        cols=cols,
        tile=tile,
        tiles=tiles,
    )
    return lists.validate().to(device)


def _shuffled_orders(length: int, slots: int, groups: int, make: torch.Generator) -> Tensor:
    orders = [torch.randperm(slots, generator=make) for _ in range(groups)]
    return torch.stack([torch.where(order < length, order, -1) for order in orders])


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty, torch.empty_like and Tensor.new_empty return: NaN, and 0x7F in each byte of ints."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(torch.nan)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(int.from_bytes(b"\x7f" * tensor.element_size(), "little"))

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield


def skip_a_block(lists: BlockLists, scale: float) -> tuple[BlockLists, float]:
    """Break a kernel: the last masked block of all is not visited."""
    rows, cols, tile = _entries(lists)
    gone = int((tile >= 0).nonzero()[-1])
    stay = torch.arange(rows.shape[0], device=rows.device) != gone
    return _rebuilt(lists, rows[stay], cols[stay], tile[stay], lists.tiles), scale


def shift_a_mask(lists: BlockLists, scale: float) -> tuple[BlockLists, float]:
    """Break a kernel: every mask is off by one key."""
    tiles = pack_bits(lists.tile_masks().roll(1, -1))
    return _rebuilt(lists, *_entries(lists), tiles), scale


def forget_the_scale(lists: BlockLists, scale: float) -> tuple[BlockLists, float]:
    """Break a kernel: the logits are not scaled."""
    return lists, 1.0


# each makes the arguments with which a right kernel computes what a wrong one would
BROKEN = {"skip_a_block": skip_a_block, "shift_a_mask": shift_a_mask, "forget_the_scale": forget_the_scale}


def _entries(lists: BlockLists) -> tuple[Tensor, Tensor, Tensor]:
    """Return the visited blocks of some lists, as `BlockLists.from_entries` takes them."""
    numbers = torch.arange(lists.groups * lists.n_q, device=lists.device)
    rows = [numbers.repeat_interleave(ends.long().diff()) for ends in (lists.full_offsets, lists.partial_offsets)]
    full = lists.full_indices[: len(rows[0])]
    tile = torch.cat([torch.full_like(full, -1), lists.partial_tiles])
    return torch.cat(rows), torch.cat([full, lists.partial_indices]), tile


def _rebuilt(lists: BlockLists, rows: Tensor, cols: Tensor, tile: Tensor, tiles: Tensor) -> BlockLists:
    return BlockLists.from_entries(
        q_len=lists.q_len,
        k_len=lists.k_len,
        block_q=lists.block_q,
        block_k=lists.block_k,
        head_group=lists.head_group,
        q_order=lists.q_order,
        k_order=lists.k_order,
        rows=rows,
        cols=cols,
        tile=tile,
        tiles=tiles,
    )
