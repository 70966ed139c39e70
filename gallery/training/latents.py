"""Latents of pictures and clips, encoded once at the start of a stage and kept on the GPU."""

import time

import torch
from camera import camera_clips
from data import MOTIONS, Pictures, caption_index
from diffusers import AutoencoderKLWan
from parallel import from_first
from whole_clip import encode


class LatentBank:
    """Latents `[n, z, t, h, w]` of training pictures under random motion, with the index of their caption.

    Args:
        vae: encodes.
        pictures: the held-out ones are left out.
        frames: of a clip, in pixels' time.
        count: latents wanted.
        seconds: after which it is enough, wanted or not.
        generator: of pictures and motions; its device is used.
    """

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
        latents: list[torch.Tensor] = []
        index: list[torch.Tensor] = []
        batch = 256 if frames == 1 else 32
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

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel, those of the first process."""
        stats = torch.stack([self.latents.mean((0, 2, 3, 4)), self.latents.std((0, 2, 3, 4))])
        mean, std = from_first(stats).tolist()
        return [round(v, 5) for v in mean], [round(v, 5) for v in std]

    def normalise(self, mean: list[float], std: list[float]) -> None:
        """To mean 0 and deviation 1 of every channel, in bfloat16."""
        shift, scale = (torch.tensor(v, device=self.latents.device).view(1, -1, 1, 1, 1) for v in (mean, std))
        self.latents = ((self.latents - shift) / scale).to(torch.bfloat16)

    def __call__(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: latents in fp32 and the index of their captions."""
        picks = torch.randint(len(self.latents), (n,), generator=generator, device=generator.device)
        return self.latents[picks].float(), self.caption[picks]
