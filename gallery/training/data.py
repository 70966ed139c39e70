"""What the stages share: classes, camera motions, captions, loading, and clips by synthetic camera motion."""

import csv
import io
import math
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# What a prompt calls it -> folders of Caltech-101.
CLASSES = {
    "airplane": ("airplanes",),
    "motorbike": ("Motorbikes",),
    "car": ("car_side",),
    "leopard": ("Leopards",),
    "watch": ("watch",),
    "bonsai": ("bonsai",),
    "sunflower": ("sunflower",),
    "grand piano": ("grand_piano",),
    "stop sign": ("stop_sign",),
    "soccer ball": ("soccer_ball",),
    "sailboat": ("ketch", "schooner"),
    "pizza": ("pizza",),
}
NAMES = tuple(CLASSES)
MOTIONS = ("pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")
FRAMES, SIDE = 17, 128  # a clip: frames, and pixels of a side
CANVAS = (200, 216)  # height and width of the canvas on which a picture lies
VIEW = 148.0  # side of the camera's view, in pixels of the canvas
PICTURE = 176  # longest side of a picture on its canvas


def caption(kind: int, motion: int | None) -> str:
    """`"an airplane, the camera pans left"`; without a motion `"an airplane"`."""
    name = NAMES[kind]
    text = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return text if motion is None else f"{text}, the camera {MOTIONS[motion]}"


def captions() -> list[str]:
    """All prompts: index `kind * 7 + motion`, motion 6 = none; the last one is the empty prompt."""
    return [caption(k, m) for k in range(len(NAMES)) for m in (*range(len(MOTIONS)), None)] + [""]


def caption_index(kind: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    return kind * (len(MOTIONS) + 1) + motion


def on_canvas(image: Image.Image) -> np.ndarray:
    """A picture, its aspect at most 1.25x nearer to the canvas's, edges continued to the canvas's border."""
    height, width = CANVAS
    aspect = image.width / image.height
    wanted = width / height
    aspect /= min(max(aspect / wanted, 1 / 1.25), 1.25)
    w, h = (PICTURE, round(PICTURE / aspect)) if aspect >= 1 else (round(PICTURE * aspect), PICTURE)
    small = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC))
    top, left = (height - h) // 2, (width - w) // 2
    return np.pad(small, ((top, height - h - top), (left, width - w - left), (0, 0)), mode="edge")


class Pictures:
    """Pictures on their canvases, `uint8 [n, 3, 200, 216]`, with class (-1: only for the autoencoder) and split."""

    def __init__(self, folder: Path, device: torch.device, *, only_classes: bool, limit: int | None = None) -> None:
        kinds = {name: k for k, folders in enumerate(CLASSES.values()) for name in folders}
        with (folder / "index.csv").open() as f:
            rows = [r for r in csv.DictReader(f) if r["class"] != "clip" and (r["class"] in kinds or not only_classes)]
        rows = rows[:: max(1, len(rows) // limit)] if limit else rows
        with tarfile.open(folder / "data.tar") as tar:
            blobs = {m.name: tar.extractfile(m).read() for m in tar if m.name.startswith("pictures/")}
        with ThreadPoolExecutor(8) as pool:
            arrays = list(pool.map(lambda r: on_canvas(Image.open(io.BytesIO(blobs["pictures/" + r["file"]]))), rows))
        self.pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
        self.kind = torch.tensor([kinds.get(r["class"], -1) for r in rows], device=device)
        self.held_out = torch.tensor([r["split"] == "held_out" for r in rows], device=device)


def real_clips(folder: Path, device: torch.device, split: str) -> list[torch.Tensor]:
    """Real clips of one split, each `uint8 [frames, 3, h, w]`."""
    with (folder / "index.csv").open() as f:
        names = {r["file"] for r in csv.DictReader(f) if r["class"] == "clip" and r["split"] == split}
    frames: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(folder / "data.tar") as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[0] == "clips" and parts[1] in names:
                frames.setdefault(parts[1], []).append((parts[2], tar.extractfile(member).read()))
    out = []
    for _, items in sorted(frames.items()):
        with ThreadPoolExecutor(8) as pool:
            arrays = list(pool.map(lambda i: np.asarray(Image.open(io.BytesIO(i[1])).convert("RGB")), sorted(items)))
        out.append(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device))
    return out


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
    """Clips of pictures `index` under `motion`, `[B, 3, frames, side, side]` in -1..1; a motion of 6 holds still.

    Speed and start vary a little. One frame gives a picture of the same statistics.
    """
    b, device = len(index), index.device
    height, width = CANVAS
    r = torch.rand(b, 4, generator=generator, device=device)
    is_ = lambda m: (motion == m).float()
    speed = 0.8 + 0.4 * r[:, 0]
    base = VIEW * (view[0] + (view[1] - view[0]) * r[:, 1])
    dx = torch.minimum(27 * speed, (width - base) / 2) * (is_(1) - is_(0))
    dy = torch.minimum(22 * speed, (height - base) / 2) * (is_(3) - is_(2))
    zoom = torch.exp(0.2 * speed * (is_(5) - is_(4)))  # side at the end over side in the middle
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


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each clip of two batches in -1..1."""
    error = ((a.float().clamp(-1, 1) - b.float().clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def contact_sheet(rows: list[list[torch.Tensor]], path: Path) -> None:
    """Save rows of pictures `[3, h, w]` in -1..1 as one picture."""
    strips = [torch.cat([p.float().cpu().clamp(-1, 1) for p in row], 2) for row in rows]
    sheet = ((torch.cat(strips, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, quality=88)


def schedule(fraction: float, step: int, *, warm: int = 100, decay: float = 0.45, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, constant, cosine over the last `decay` of the time."""
    down = 1.0 if fraction < 1 - decay else 0.5 * (1 + math.cos(math.pi * (fraction - 1 + decay) / decay))
    return min(1.0, (step + 1) / warm) * max(floor, down)
