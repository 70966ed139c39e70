"""Latents of pictures and clips, encoded once at the start of a stage and kept on the GPU."""

import time

import torch
from data import MOTIONS, Pictures, camera_clips, caption_index
from diffusers import AutoencoderKLWan
from whole_clip import encode


class LatentBank:
    """Normalised latents `[n, z, t, h, w]` of training pictures under random motion, with the index of their caption."""

    def __init__(
        self,
        vae: AutoencoderKLWan,
        pictures: Pictures,
        frames: int,
        count: int,
        seconds: float,
        generator: torch.Generator,
    ) -> None:
        device, start = generator.device, time.time()
        train = (~pictures.held_out).nonzero()[:, 0]
        per_class = torch.bincount(pictures.kind[train]).float()
        weights = per_class[pictures.kind[train]].rsqrt()  # a class's share grows with the root of its pictures
        latents, index, batch = [], [], 256 if frames == 1 else 32
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            while len(latents) * batch < count and (not latents or time.time() - start < seconds):
                picks = train[torch.multinomial(weights, batch, replacement=True, generator=generator)]
                motion = torch.randint(len(MOTIONS), (batch,), generator=generator, device=device)
                clips = camera_clips(pictures.pixels, picks, motion, generator, frames)
                mean = encode(vae, clips).chunk(2, 1)[0]
                latents.append(mean.float())
                # One caption in eight, and half of those of still pictures, does not name the motion.
                bare = torch.rand(batch, generator=generator, device=device) < (0.5 if frames == 1 else 0.125)
                index.append(caption_index(pictures.kind[picks], torch.where(bare, len(MOTIONS), motion)))
        self.latents, self.caption = torch.cat(latents), torch.cat(index)

    def normalise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        shape = (1, -1, 1, 1, 1)
        self.latents = ((self.latents - mean.view(shape)) / std.view(shape)).to(torch.bfloat16)

    def __call__(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        picks = torch.randint(len(self.latents), (n,), generator=generator, device=generator.device)
        return self.latents[picks].float(), self.caption[picks]
