"""Flow matching: noise levels, the loss, and the target that holds guidance."""

import torch
from diffusers import WanTransformer3DModel
from text import Captions
from trainer import Trainer

SHIFT = 3.0  # of the noise schedule, in training and sampling
DROPPED = 0.1  # share of captions that training empties
GUIDED_ABOVE = 0.15  # noise level under which the target stays plain


def shifted(levels: torch.Tensor) -> torch.Tensor:
    """Noise levels in 0..1 after the shift towards noise."""
    return SHIFT * levels / (1 + (SHIFT - 1) * levels)


def noise_levels(n: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels `[n]` in (0, 1): half stratified uniform, half logit-normal, then shifted as in sampling."""
    device = generator.device
    u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    middle = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    return shifted(torch.where(torch.rand(n, generator=generator, device=device) < 0.5, u, middle))


@torch.no_grad()
def guidance_direction(
    teacher: WanTransformer3DModel, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, empty: torch.Tensor
) -> torch.Tensor:
    """The teacher's flow with the caption less its flow without, of the shape of `noisy`."""
    both = torch.cat([text, empty.expand_as(text)]).detach()
    given, free = teacher(noisy.repeat(2, 1, 1, 1, 1), t.repeat(2), both, return_dict=False)[0].float().chunk(2)
    return given - free


def flow_loss(
    trainer: Trainer,
    teacher: WanTransformer3DModel | None,
    captions: Captions,
    batch: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
    guidance: float,
) -> torch.Tensor:
    """Mean squared error of the predicted flow from latents to noise.

    Args:
        trainer: the model and the text encoder that learn.
        teacher: frozen model; its guidance is added to the target. None: plain flow matching.
        captions: of all classes and motions.
        batch: latents `[n, z, t, h, w]`, normalised, and the index `[n]` of their captions.
        generator: of captions dropped, noise levels and noise, on the device of the latents.
        guidance: what is added is so many times (with caption - without); sampling at scale s has s - 1.

    Returns:
        The loss, a scalar.
    """
    x, caption = batch
    n, device = len(x), x.device
    drop = torch.rand(n, generator=generator, device=device) < DROPPED
    caption = torch.where(drop, captions.empty, caption)
    sigma = noise_levels(n, generator)
    noise = torch.randn(x.shape, generator=generator, device=device)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy, target, t = (1 - level) * x + level * noise, noise - x, sigma * 1000
    table = captions.embed(trainer.text)
    text = table[caption]
    if teacher is not None:
        strength = guidance * ((sigma > GUIDED_ABOVE) & ~drop).float().view(-1, 1, 1, 1, 1)
        target = target + strength * guidance_direction(teacher, noisy, t, text, table[captions.empty])
    out = trainer.model(noisy, t, text, return_dict=False)[0]
    return (out.float() - target).square().mean()
