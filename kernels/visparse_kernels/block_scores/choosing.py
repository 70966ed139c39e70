"""Which blocks to keep, by their scores; on the device, in static shapes, nothing waits for it."""

import torch
from torch import Tensor

from visparse_kernels.kernels_apply import kernels_apply


def choose_top_k(
    scores: Tensor, count: int | Tensor, always: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Keep the highest blocks of each row; of equal ones those with the lowest index. NaN counts as the highest.

    Args:
        scores: [..., n_k], floats.
        count: how many to keep in each row, 1 to n_k; fewer are kept where fewer are left to choose from. For scores
            [B, H, n_q, n_k] also int32 [H], a number for each head, whose contents are not checked.
        always: bool [n_k], blocks kept in every row on top; they do not count.
        allowed: bool, broadcasts to ``scores``: no other block is kept, not even by ``always``.

    Returns:
        bool [..., n_k].

    Raises:
        ValueError: ``count`` is out of range, or a shape does not fit.
    """
    n_k = _check(scores, always, allowed)
    if isinstance(count, Tensor):
        fits = scores.ndim == 4 and tuple(count.shape) == (scores.shape[1],)
        if not fits or count.dtype != torch.int32 or count.device != scores.device:
            raise ValueError(
                f"count: wanted an int, or int32 [heads] on {scores.device} beside scores [batch, heads, n_q, n_k], "
                f"got {count.dtype} {list(count.shape)} on {count.device} beside {list(scores.shape)}"
            )
        count = count.contiguous()
    elif not 1 <= count <= n_k:
        raise ValueError(f"count: wanted 1 to {n_k} blocks (a row of scores), got {count}; clip it to this range")
    if always is None and allowed is None and kernels_apply(scores):
        from visparse_kernels.block_scores.choosing_triton import can_choose, top_k

        if can_choose(scores):
            return top_k(scores, count)
    _, index = _ranked(scores, always, allowed)
    limit = count[:, None, None] if isinstance(count, Tensor) else count
    kept = torch.arange(n_k, device=scores.device).expand_as(index) < limit
    return _by_block(kept, index, always, allowed)


def choose_top_p(
    scores: Tensor,
    mass: float,
    least: int,
    most: int,
    always: Tensor | None = None,
) -> Tensor:
    """Keep, in each row, the fewest of the highest blocks whose share of the row's total reaches ``mass``.

    Args:
        scores: [..., n_k], not negative.
        mass: share to reach, over 0 to 1.
        least: keep at least so many in each row, from 1 on.
        most: keep at most so many.
        always: bool [n_k], blocks kept in every row on top; they count neither in numbers nor in the total.

    Returns:
        bool [..., n_k].

    Raises:
        ValueError: a number is out of range, or a mask does not fit.
    """
    n_k = _check(scores, always, None)
    _check_range(least, most, n_k)
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"mass: wanted a share over 0 up to 1, got {mass}; 0.9 keeps nine tenths of a row's total")
    ordered, index = _ranked(scores, always, None)
    reached = ordered.clamp(min=0.0).cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    number = (before < mass * reached[..., -1:]).sum(-1, keepdim=True).clamp(least, most)
    kept = torch.arange(n_k, device=scores.device) < number
    return _by_block(kept, index, always, None)


def choose_per_head(
    scores: Tensor,
    total_share: float,
    least: int,
    most: int,
    always: Tensor | None = None,
) -> Tensor:
    """Spend one budget per batch row over all heads and query blocks: where a block scores more, more are kept.

    The mean number kept in a row is ``total_share * n_k``, exactly (to one block in all), limits included: a row
    takes its ``least`` highest blocks first, and the rest of the budget goes to the highest of what is left.

    Args:
        scores: [B, H, n_q, n_k], comparable over heads, as means of probabilities are.
        total_share: mean share of the blocks to keep; times n_k not below ``least`` nor above ``most``.
        least: keep at least so many in each row, from 1 on.
        most: keep at most so many.
        always: bool [n_k], blocks kept in every row on top; they do not count.

    Returns:
        bool [B, H, n_q, n_k].

    Raises:
        ValueError: a number is out of range, or a shape does not fit.
    """
    n_k = _check(scores, always, None)
    _check_range(least, most, n_k)
    if scores.ndim != 4:
        raise ValueError(f"scores: wanted [batch, heads, n_q, n_k], got {list(scores.shape)}; add the missing axes")
    if not least <= total_share * n_k <= most:
        raise ValueError(
            f"total_share: wanted a mean of {least} to {most} blocks (least, most) of {n_k}, got {total_share} * {n_k} "
            f"= {total_share * n_k:g}; change the share or the limits"
        )
    batch, heads, n_q, _ = scores.shape
    ordered, index = _ranked(scores, always, None)
    free = ordered[..., least:most].flatten(1)
    budget = round(total_share * n_k * heads * n_q) - least * heads * n_q
    places = free.sort(dim=1, descending=True, stable=True).indices[:, :budget]
    won = torch.zeros_like(free, dtype=torch.bool).scatter_(1, places, True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[..., :least] = True
    kept[..., least:most] = won.view(batch, heads, n_q, most - least)
    return _by_block(kept, index, always, None)


def _ranked(scores: Tensor, always: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sort rows, highest first; what is not to be chosen comes last, with -inf."""
    if always is not None:
        scores = scores.masked_fill(always, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    ordered, index = scores.sort(dim=-1, descending=True, stable=True)
    return ordered, index


def _by_block(kept: Tensor, index: Tensor, always: Tensor | None, allowed: Tensor | None) -> Tensor:
    """Undo the sorting of rows; a place that fell to an ``always`` block keeps nothing more."""
    chosen = torch.zeros_like(kept).scatter_(-1, index, kept)
    if always is not None:
        chosen = chosen | always
    return chosen if allowed is None else chosen & allowed


def _check(scores: Tensor, always: Tensor | None, allowed: Tensor | None) -> int:
    if scores.ndim < 1 or not scores.is_floating_point():
        raise ValueError(
            f"scores: wanted floats [..., n_k], got {scores.dtype} {list(scores.shape)}; take them from block_scores"
        )
    n_k = scores.shape[-1]
    if always is not None and (always.dtype != torch.bool or tuple(always.shape) != (n_k,)):
        raise ValueError(
            f"always: wanted bool [{n_k}] (one flag per key block), got {always.dtype} {list(always.shape)}; "
            "give the same blocks for all rows"
        )
    if allowed is not None:
        fits = allowed.dtype == torch.bool and allowed.ndim <= scores.ndim
        pairs = zip(reversed(allowed.shape), reversed(scores.shape), strict=False)
        if not fits or any(a not in (1, s) for a, s in pairs):
            raise ValueError(
                f"allowed: wanted bool that broadcasts to {list(scores.shape)}, got {allowed.dtype} "
                f"{list(allowed.shape)}; give one flag per key block, or per row and block"
            )
    return n_k


def _check_range(least: int, most: int, n_k: int) -> None:
    if not 1 <= least <= most <= n_k:
        raise ValueError(
            f"least, most: wanted 1 <= least <= most <= {n_k} (blocks in a row), got {least} and {most}; "
            "a row that keeps nothing has no output"
        )
