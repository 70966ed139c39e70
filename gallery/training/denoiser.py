"""The small transformer, a stock class: its sizes, how it starts, and the attention kernels that training uses."""

import torch
from diffusers import WanTransformer3DModel
from text import TEXT_DIM
from torch.nn.attention import SDPBackend

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CONFIG = dict(
    patch_size=(1, 1, 1),
    num_attention_heads=4,
    attention_head_dim=64,
    text_dim=TEXT_DIM,
    freq_dim=256,
    ffn_dim=1024,
    num_layers=8,
    cross_attn_norm=True,
    rope_max_seq_len=256,
)


def build_transformer(channels: int) -> WanTransformer3DModel:
    """A new transformer for latents of so many channels: zero output, small gates."""
    model = WanTransformer3DModel(in_channels=channels, out_channels=channels, **CONFIG)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        model.condition_embedder.time_proj.weight.mul_(0.1)
        for block in model.blocks:
            block.scale_shift_table[:, 2::3].fill_(0.3)
            block.attn2.to_out[0].weight.mul_(0.3)
    return model
