"""The pipeline that ships, the clips that are judged, and how far they are from dense ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visparse.measure.generate import find_denoisers, load_pipeline
from visparse.measure.quality import PSNR_CAP
from visparse.measure.timing import StepClock
from visparse_pipelines import tiny_video_path

# The transformer was trained on every one of these things under one camera motion. Two motions in one prompt are new.
THINGS = ("an airplane", "a motorbike", "a car", "a watch", "a bonsai", "a sunflower", "a grand piano", "a pizza")
PANS = ("pans left", "pans right", "pans up", "pans down")
ZOOMS = ("zooms in", "zooms out")


class Size(NamedTuple):
    """Size of a clip, and the tiles of its grid.

    Args:
        num_frames, height, width: in frames and pixels.
        blocks: tokens of a tile of queries and of keys; None: what the kernels like.
    """

    num_frames: int
    height: int
    width: int
    blocks: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """In tokens: the autoencoder halves time and quarters space, and a patch is one latent."""
        return (self.num_frames + 1) // 2, self.height // 4, self.width // 4

    @property
    def settings(self) -> dict[str, int]:
        """Arguments of `visparse.sparsify` that set the tiles."""
        return {} if self.blocks is None else {"block_q": self.blocks[0], "block_k": self.blocks[1]}


SIZES = {"tiny": Size(9, 64, 64, (64, 32)), "small": Size(17, 128, 128), "long": Size(33, 256, 256)}


class Wish(NamedTuple):
    """One clip to make."""

    prompt: str
    seed: int


def held_out_prompts(count: int) -> list[str]:
    """So many prompts that no training caption equals, at most 32; the next ones are for calibration."""
    every = [
        f"{thing}, the camera {pan}, {zoom}"
        for shift in range(4)
        for at, thing in enumerate(THINGS)
        for pan, zoom in ((PANS[(at + shift) % 4], ZOOMS[(at // 4 + shift) % 2]),)
    ]
    if not 1 <= count <= len(every):
        raise ValueError(f"prompts: wanted 1 to {len(every)}, got {count}")
    return every[:count]


def wishes(prompts: int, seeds: int) -> list[Wish]:
    """The clips that are judged: every prompt with every seed; no two share their noise."""
    return [Wish(text, 1000 * seed + at) for seed in range(seeds) for at, text in enumerate(held_out_prompts(prompts))]


def calibration_wishes(count: int = 2) -> list[Wish]:
    """Clips by which plans are searched and patterns are chosen; neither their prompts nor their seeds are judged.

    Their things were trained, as those of the judged ones were, but none is among these.

    Args:
        count: at most 8.
    """
    every = [
        "a leopard, the camera pans right, zooms in",
        "a sailboat, the camera pans up, zooms out",
        "a stop sign, the camera pans left, zooms out",
        "a soccer ball, the camera pans down, zooms in",
        "a leopard, the camera pans down, zooms out",
        "a sailboat, the camera pans left, zooms in",
        "a stop sign, the camera pans up, zooms in",
        "a soccer ball, the camera pans right, zooms out",
    ]
    if not 1 <= count <= len(every):
        raise ValueError(f"calibration: wanted 1 to {len(every)} prompts, got {count}")
    return [Wish(text, 900_001 + at) for at, text in enumerate(every[:count])]


@dataclass(frozen=True)
class Clips:
    """What one pass over the wishes made.

    Args:
        frames: uint8 `[clips, frames, 3, height, width]`, on the device.
        latents: fp32 `[clips, ...]`, what the decoder was given.
        seconds: of each batch, end to end. seconds_denoise: of its denoiser steps, and seconds_of_steps: of each.
    """

    frames: Tensor
    latents: Tensor
    seconds: tuple[float, ...]
    seconds_denoise: tuple[float, ...]
    seconds_of_steps: tuple[tuple[float, ...], ...] = ()


class Studio:
    """The loaded pipeline.

    Args:
        size: of the clips.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        batch: clips made at a time.
    """

    def __init__(self, size: Size, device: str, batch: int) -> None:
        self.pipe, self.dtype = load_pipeline(tiny_video_path(), device=device)
        self.size, self.batch = size, batch
        self.device: torch.device = self.pipe._execution_device

    def make(
        self,
        wanted: Sequence[Wish],
        steps: int,
        *,
        before_last: Callable[[], None] | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> Clips:
        """Make clips.

        Args:
            wanted: the clips.
            steps: of the denoiser.
            before_last: called once, after the last step but one of the first batch.
            after_batch: called after each batch.
        """
        batches = []
        for at in range(0, len(wanted), self.batch):
            batches.append(self._batch(wanted[at : at + self.batch], steps, before_last if at == 0 else None))
            if after_batch is not None:
                after_batch()
        return Clips(
            torch.cat([made.frames for made in batches]),
            torch.cat([made.latents for made in batches]),
            tuple(made.seconds[0] for made in batches),
            tuple(made.seconds_denoise[0] for made in batches),
            tuple(made.seconds_of_steps[0] for made in batches),
        )

    @torch.no_grad()
    def _batch(self, wanted: Sequence[Wish], steps: int, before_last: Callable[[], None] | None) -> Clips:
        clock = StepClock(find_denoisers(self.pipe), self.device)

        def on_step_end(pipe: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
            clock.on_step_end(pipe, step, timestep, values)
            if before_last is not None and step == steps - 2:
                before_last()
            return {}

        with clock:
            latents = self.pipe(
                prompt=[wish.prompt for wish in wanted],
                num_frames=self.size.num_frames,
                height=self.size.height,
                width=self.size.width,
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=[torch.Generator("cpu").manual_seed(wish.seed) for wish in wanted],
                callback_on_step_end=on_step_end,
                output_type="latent",
            ).frames.float()
            frames = torch.cat([self._decode(part) for part in latents.split(4 if self.device.type == "cuda" else 1)])
        return Clips(frames, latents, (clock.seconds,), (clock.seconds_denoise,), (tuple(clock.seconds_of_steps),))

    def _decode(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(value, device=latents.device).view(1, -1, 1, 1, 1)
            for value in (config.latents_mean, config.latents_std)
        )
        video = self.pipe.vae.decode(latents * std + mean).sample
        if not torch.isfinite(video).all():
            raise RuntimeError("the pipeline made frames with NaN or infinity")
        return (video / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).transpose(1, 2)


def quality(made: Clips, dense: Clips) -> dict[str, Any]:
    """PSNR (dB) and SSIM, means over the frames of a clip, and relative error of the latents: clip by clip, and means.

    The definitions are those of `visparse.measure.quality`; this is faster for many clips on a GPU.
    """
    psnr, ssim, errors = [], [], []
    for video, wanted, latents, latents_wanted in zip(
        made.frames, dense.frames, made.latents, dense.latents, strict=True
    ):
        mean_square = (video.double() - wanted.double()).square().mean((1, 2, 3)) / 255**2
        psnr.append(float((-10 * mean_square.clamp(min=1e-30).log10()).clamp(max=PSNR_CAP).mean()))
        ssim.append(_ssim(video, wanted))
        difference = latents.double() - latents_wanted.double()
        errors.append(float(difference.norm() / latents_wanted.double().norm()))
    return {
        "psnr": sum(psnr) / len(psnr),
        "psnr_min": min(psnr),
        "psnr_clips": psnr,
        "ssim": sum(ssim) / len(ssim),
        "ssim_min": min(ssim),
        "ssim_clips": ssim,
        "latent_error": sum(errors) / len(errors),
        "latent_error_clips": errors,
    }


def _ssim(video: Tensor, wanted: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(video.double() / 255, wanted.double() / 255, data_range=1.0)
    return float(value)


@contextmanager
def quiet_warnings() -> Iterator[list[str]]:
    """Collect warnings as text, so that a row can say that something ran dense against its plan."""
    import warnings

    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += dict.fromkeys(str(entry.message) for entry in caught if entry.category is RuntimeWarning)
