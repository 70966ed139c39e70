"""Rows of a tensor in 8-bit floats (e4m3), with one fp32 scale per batch row, head and 128 rows."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from visparse.compensation.residual_sizes import SCALE_ROWS

_FP8 = torch.float8_e4m3fn
_PEAK = torch.finfo(_FP8).max
_TINY = torch.finfo(torch.float32).tiny


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 8 bits so that the largest number of each 128 rows of a head uses the whole range.

    Args:
        x: [B, R, H, D], any float dtype.

    Returns:
        values e4m3 [B, R, H, D] and scales fp32 [B, ceil(R / 128), H]; x is about values * scales.
    """
    peak = torch.linalg.vector_norm(x, torch.inf, dim=-1).float()
    parts = -(-x.shape[1] // SCALE_ROWS)
    peak = pad(peak, (0, 0, 0, parts * SCALE_ROWS - x.shape[1]))
    scales = (peak.unflatten(1, (parts, SCALE_ROWS)).amax(2) / _PEAK).clamp(min=_TINY)
    return (x / _per_row(scales, x.shape[1])).to(_FP8), scales


def rows_from_fp8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_fp8`.

    Args:
        values: e4m3 [B, R, H, D].
        scales: fp32 [B, ceil(R / 128), H].
        dtype: dtype of the result.
    """
    rows = values.to(dtype)
    return torch.mul(rows, _per_row(scales, values.shape[1]), out=rows)


def from_fp8_plus(values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Undo `to_fp8` and add; the product and the sum are rounded once, to the dtype of ``out``.

    Args:
        values: e4m3 [B, R, H, D].
        scales: fp32 [B, ceil(R / 128), H].
        out: [B, R, H, D], what is added.
    """
    rows = values.to(out.dtype)
    return torch.addcmul(out, rows, _per_row(scales, values.shape[1]), out=rows)


def _per_row(scales: Tensor, rows: int) -> Tensor:
    """Give every row its scale: [B, parts, H] to [B, R, H, 1]."""
    batch, parts, heads = scales.shape
    wide = scales[:, :, None].expand(batch, parts, SCALE_ROWS, heads)
    return wide.reshape(batch, parts * SCALE_ROWS, heads)[:, :rows, :, None]
