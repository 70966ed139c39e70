"""`AutoencoderKLWan` on a whole clip at once: the same numbers as its frame-by-frame caches, in far fewer launches.

The stock class walks a clip in pieces of four frames and carries caches from piece to piece. Its convolutions are
causal, so one pass over the whole clip gives the same result if the first frame is left out of the temporal resampling.
Training uses this; `tests/gallery/test_whole_clip.py` compares it with the stock class.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """The stock layer on all frames at once; the first frame is not resampled in time."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        rest = layer.time_conv(x[:, :, 1:])
        b, c, t, h, w = rest.shape
        rest = rest.view(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
        x = torch.cat([x[:, :, :1], rest], 2)
    b, c, t, h, w = x.shape
    x = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = x.view(b, t, *x.shape[1:]).transpose(1, 2)
    if layer.mode == "downsample3d" and t > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Moments `[B, 2z, t, h, w]` (mean, then log variance) of a clip `[B, 3, F, H, W]` in -1..1."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size or 1))
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clip `[B, 3, F, H, W]`, not clamped, of latents `[B, z, t, h, w]`."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        for layer in block.upsamplers or ():
            x = _resample(layer, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size or 1)
