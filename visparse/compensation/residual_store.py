"""Storage of a cached residual, dense minus sparse output of attention: one object per branch and layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visparse.compensation.residual_fp8 import from_fp8_plus, rows_from_fp8, to_fp8
from visparse.compensation.residual_groups import TokenGroups
from visparse.compensation.residual_sizes import DEFAULT_RANK, check_storage

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(eq=False)
class Stored(ABC):
    """A stored residual.

    Args:
        shape: (B, N, H, D) of the residual.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def add_to(self, out: Tensor) -> Tensor:
        """Return ``out + residual`` as a new tensor in the dtype of ``out``; ``out`` stays as it is.

        Args:
            out: [B, N, H, D], shape and dtype of the residual.

        Raises:
            ValueError: the shape does not fit.
            TypeError: the dtype does not fit.
        """
        if tuple(out.shape) != self.shape:
            raise ValueError(
                f"out: wanted shape {list(self.shape)}, as the stored residual has, got {list(out.shape)}; "
                "store a residual of this run"
            )
        if out.dtype != self.dtype:
            raise TypeError(
                f"out: wanted {self.dtype}, as the stored residual has, got {out.dtype}; store it in the output's dtype"
            )
        return self._add_to(out)

    def prefetch(self) -> None:  # noqa: B027
        """Start to fetch the residual, where it does not lie on the device; call it about one layer ahead."""

    @property
    def nbytes(self) -> int:
        """Device memory, in bytes; the tables of groups, which layers share, are not counted."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def host_nbytes(self) -> int:
        """Pinned host memory, in bytes."""
        return 0

    def to(self, device: torch.device | str) -> "Stored":
        """Return the stored residual on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, (Tensor, TokenGroups))
        }
        return replace(self, **moved)

    @abstractmethod
    def _add_to(self, out: Tensor) -> Tensor: ...


@dataclass(eq=False)
class StoredFull(Stored):
    """The residual as it came. Adding reads two tensors and writes one."""

    residual: Tensor

    def _add_to(self, out: Tensor) -> Tensor:
        return out + self.residual


@dataclass(eq=False)
class StoredFp8(Stored):
    """Each number in 8 bits. Adding converts into a new tensor, and then adds in place there."""

    values: Tensor
    scales: Tensor

    def _add_to(self, out: Tensor) -> Tensor:
        return from_fp8_plus(self.values, self.scales, out)


@dataclass(eq=False)
class StoredAverage(Stored):
    """One mean per group of tokens. Adding gives every token its mean in a new tensor, and then adds in place there."""

    means: Tensor
    groups: TokenGroups

    def _add_to(self, out: Tensor) -> Tensor:
        return self.groups.spread(self.means).add_(out)


@dataclass(eq=False)
class StoredAverageFp8(Stored):
    """One mean per group of tokens, in 8 bits. Adding unpacks the few means, and then does what the average does."""

    values: Tensor
    scales: Tensor
    groups: TokenGroups

    def _add_to(self, out: Tensor) -> Tensor:
        return self.groups.spread(rows_from_fp8(self.values, self.scales, out.dtype)).add_(out)


@dataclass(eq=False)
class StoredLowRank(Stored):
    """A product of two thin matrices per batch row and head. Adding multiplies them, and then adds."""

    left: Tensor
    right: Tensor

    def _add_to(self, out: Tensor) -> Tensor:
        return out + (self.left @ self.right).transpose(1, 2)


def store(residual: Tensor, storage: str, *, groups: TokenGroups | None = None, rank: int | None = None) -> Stored:
    """Store a residual.

    Cost of adding, in bytes moved per number of a 16-bit output, before caches: full 6, fp8 9, averages 8, low-rank 8.

    Args:
        residual: [B, N, H, D], dense minus sparse output; fp16, bf16, fp32 or fp64. "full" keeps this very tensor where
            it is contiguous: do not write into it afterwards.
        storage: "full"; "fp8": e4m3, one fp32 scale per batch row, head and 128 tokens; "average": one mean per group
            of tokens; "average-fp8": these means in fp8; "low-rank": the best approximation of a given rank per batch
            row and head; "host": full, in pinned host memory, fetched by `Stored.prefetch` on a stream of its own;
            what is not on a CUDA device is kept in full where it is.
        groups: which tokens share a mean; for the two averages only.
        rank: for "low-rank" only; 16 unless said otherwise, at most the head dimension.

    Raises:
        ValueError: an unknown storage, a wrong shape, groups or a rank that are missing, out of range or without use.
        TypeError: a residual of another dtype.
    """
    check_storage(storage)
    if residual.ndim != 4:
        raise ValueError(f"residual: wanted [batch, tokens, heads, head_dim], got {list(residual.shape)}; reshape it")
    if residual.dtype not in _DTYPES:
        raise TypeError(f"residual: wanted fp16, bf16, fp32 or fp64, got {residual.dtype}; cast it to one of these")
    if storage != "low-rank" and rank is not None:
        raise ValueError(f"rank: wanted None for storage {storage!r}, got {rank}; only low-rank has a rank")
    residual = residual.detach()
    shape, dtype = tuple(residual.shape), residual.dtype
    if storage.startswith("average"):
        groups = _check_groups(groups, storage, shape[1]).to(residual.device)
        means = groups.means(residual)
        if storage == "average":
            return StoredAverage(shape, dtype, means.to(dtype), groups)
        return StoredAverageFp8(shape, dtype, *to_fp8(means), groups)
    if groups is not None:
        raise ValueError(f"groups: wanted None for storage {storage!r}, got groups; only averages have groups")
    if storage == "fp8":
        return StoredFp8(shape, dtype, *to_fp8(residual))
    if storage == "low-rank":
        return StoredLowRank(shape, dtype, *_factors(residual, DEFAULT_RANK if rank is None else rank))
    if storage == "host" and residual.is_cuda:
        from visparse.compensation.residual_host import keep_on_host

        return keep_on_host(residual)
    return StoredFull(shape, dtype, residual.contiguous())


def _check_groups(groups: TokenGroups | None, storage: str, tokens: int) -> TokenGroups:
    if groups is None:
        raise ValueError(
            f"groups: wanted TokenGroups for storage {storage!r}, got None; build them with TokenGroups.from_tiles"
        )
    if groups.tokens != tokens:
        raise ValueError(
            f"groups: wanted groups of {tokens} tokens, as the residual has, got {groups.tokens}; "
            "build them for this layout"
        )
    return groups


def _factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split [B, N, H, D] into left [B, H, N, r] and right [B, H, r, D], whose product is nearest in least squares.

    The right factor holds the r leading eigenvectors of the D x D Gram matrix, computed in fp32 (fp64 for fp64). For
    each batch row and head that is 2 N D (D + r) operations and one small eigenvalue problem. Directions weaker than
    3e-4 of the strongest one are lost to rounding in fp32.
    """
    head_dim = residual.shape[-1]
    if not 1 <= rank <= head_dim:
        raise ValueError(f"rank: wanted 1 to {head_dim} (the head dimension), got {rank}; 16 is usual")
    wide = torch.promote_types(residual.dtype, torch.float32)
    heads = [head.to(wide) for head in residual.unbind(2)]
    gram = torch.stack([head.transpose(-1, -2) @ head for head in heads], 1)
    leading = torch.linalg.eigh(gram).eigenvectors[..., -rank:]
    left = torch.stack([head @ leading[:, index] for index, head in enumerate(heads)], 1)
    return left.to(residual.dtype), leading.transpose(-1, -2).to(residual.dtype, memory_format=torch.contiguous_format)
