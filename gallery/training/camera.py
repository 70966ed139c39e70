"""Synthetic camera motion: clips that pan or zoom over one still picture."""

import torch
import torch.nn.functional as F
from data import CANVAS, FRAMES, MOTIONS, SIDE

VIEW = 148.0  # side of the camera's view, in pixels of the canvas


def camera_clips(
    pixels: torch.Tensor,
    index: torch.Tensor,
    motion: torch.Tensor,
    generator: torch.Generator,
    frames: int = FRAMES,
    *,
    view: tuple[float, float] = (0.97, 1.03),
    side: int = SIDE,
) -> torch.Tensor:
    """Clips of pictures under camera motion. Speed and start vary a little.

    Args:
        pixels: `uint8 [n, 3, 200, 216]`, pictures on their canvases.
        index: int64 `[B]`, which picture.
        motion: int64 `[B]`, index in `MOTIONS`; 6 holds still.
        generator: of speed, start and view, on the device of `index`.
        frames: of a clip; one frame gives a picture of the same statistics.
        view: least and most side of the camera's view, as a share of `VIEW`.
        side: of a frame, in pixels.

    Returns:
        fp32 `[B, 3, frames, side, side]` in -1..1.
    """
    b, device = len(index), index.device
    height, width = CANVAS
    r = torch.rand(b, 4, generator=generator, device=device)

    def does(name: str) -> torch.Tensor:
        return (motion == MOTIONS.index(name)).float()

    speed = 0.8 + 0.4 * r[:, 0]
    base = VIEW * (view[0] + (view[1] - view[0]) * r[:, 1])
    dx = torch.minimum(27 * speed, (width - base) / 2) * (does("pans right") - does("pans left"))
    dy = torch.minimum(22 * speed, (height - base) / 2) * (does("pans down") - does("pans up"))
    zoom = torch.exp(0.2 * speed * (does("zooms out") - does("zooms in")))  # side at the end over side in the middle
    u = torch.linspace(-1, 1, frames, device=device)[None] if frames > 1 else 2 * r[:, 2:3] - 1
    v = base[:, None] * zoom[:, None] ** u
    cx = width / 2 + 6 * (r[:, 2:3] - 0.5) + dx[:, None] * u
    cy = height / 2 + 6 * (r[:, 3:4] - 0.5) + dy[:, None] * u
    p = (torch.arange(side, device=device) + 0.5) / side - 0.5
    gx = (p[None, None, None, :] * v[..., None, None] + cx[..., None, None]) * (2 / width) - 1
    gy = (p[None, None, :, None] * v[..., None, None] + cy[..., None, None]) * (2 / height) - 1
    grid = torch.stack([gx.expand(-1, -1, side, -1), gy.expand(-1, -1, -1, side)], -1).view(b, frames * side, side, 2)
    source = pixels[index].float() / 127.5 - 1
    out = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.view(b, 3, frames, side, side)
