"""How far one video is from another: PSNR and SSIM per frame, relative error of latents."""

from __future__ import annotations

import torch

PSNR_CAP = 100.0
"""dB; what a frame gets that is equal to its reference, because JSON has no infinity."""


def psnr_per_frame(video: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of every frame.

    Args:
        video, reference: `[frames, height, width, 3]`, uint8.

    Returns:
        One value per frame in dB, at most `PSNR_CAP`; an equal frame gets `PSNR_CAP`.

    Raises:
        TypeError, ValueError: the videos are not uint8 or differ in shape.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_videos(video, reference)
    values = []
    for frame, wanted in zip(video, reference, strict=True):
        value = peak_signal_noise_ratio(_unit(frame), _unit(wanted), data_range=1.0)
        values.append(min(float(value), PSNR_CAP))
    return values


def ssim_per_frame(video: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Structural similarity of every frame, Gaussian window of 11 x 11 with sigma 1.5.

    Args:
        video, reference: `[frames, height, width, 3]`, uint8, at least 11 pixels high and wide.

    Returns:
        One value per frame; 1 for an equal frame.

    Raises:
        TypeError, ValueError: the videos are not uint8, differ in shape or are too small.

    Source:
        Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_videos(video, reference)
    if min(video.shape[1:3]) < 11:
        raise ValueError(f"video: SSIM needs at least 11 x 11 pixels, got {video.shape[1]} x {video.shape[2]}")
    values = []
    for frame, wanted in zip(video, reference, strict=True):
        value = structural_similarity_index_measure(_unit(frame), _unit(wanted), data_range=1.0)
        values.append(float(value))
    return values


def latent_error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error of latents: norm of the difference over the norm of the reference.

    Args:
        latents, reference: any equal shape, floating point.

    Returns:
        0 for equal latents, about 1.4 for unrelated ones of the same size.

    Raises:
        ValueError: the shapes differ, or the reference is zero or not finite.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"latents: wanted shape {tuple(reference.shape)}, got {tuple(latents.shape)}")
    wanted = reference.double()
    size = float(wanted.norm())
    if not 0 < size < float("inf"):
        raise ValueError(f"reference: wanted finite latents that are not all zero, got norm {size}")
    return float((latents.double() - wanted).norm()) / size


def _check_videos(video: torch.Tensor, reference: torch.Tensor) -> None:
    for name, value in (("video", video), ("reference", reference)):
        if value.dtype != torch.uint8:
            raise TypeError(f"{name}: wanted uint8, got {value.dtype}")
        if value.ndim != 4 or value.shape[-1] != 3 or value.shape[0] == 0:
            raise ValueError(f"{name}: wanted [frames, height, width, 3], got {list(value.shape)}")
    if video.shape != reference.shape:
        raise ValueError(f"video: wanted the reference's shape {list(reference.shape)}, got {list(video.shape)}")


def _unit(frame: torch.Tensor) -> torch.Tensor:
    return frame.permute(2, 0, 1)[None].double() / 255
