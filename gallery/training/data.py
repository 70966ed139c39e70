"""What the stages share: classes, motions and captions, pictures and clips in, contact sheets out."""

import csv
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
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
    """Index in `captions()` of classes and motions; a motion of 6 is not named."""
    return kind * (len(MOTIONS) + 1) + motion


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of a file in an archive."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name}: wanted a file, got a folder or a link; pack the archive again")
    return file.read()


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
    """Pictures on their canvases, `uint8 [n, 3, 200, 216]`, with class (-1: only for the autoencoder) and split.

    Args:
        folder: what `prepare.py` wrote.
        device: where they are kept.
        only_classes: leave out what no prompt names.
        limit: take only about so many.
    """

    def __init__(self, folder: Path, device: torch.device, *, only_classes: bool, limit: int | None = None) -> None:
        kinds = {name: k for k, folders in enumerate(CLASSES.values()) for name in folders}
        with (folder / "index.csv").open() as f:
            rows = [r for r in csv.DictReader(f) if r["class"] != "clip" and (r["class"] in kinds or not only_classes)]
        rows = rows[:: max(1, len(rows) // limit)] if limit else rows
        with tarfile.open(folder / "data.tar") as tar:
            blobs = {m.name: read(tar, m) for m in tar if m.name.startswith("pictures/")}
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
                frames.setdefault(parts[1], []).append((parts[2], read(tar, member)))
    out = []
    for _, items in sorted(frames.items()):
        with ThreadPoolExecutor(8) as pool:
            arrays = list(pool.map(lambda i: np.asarray(Image.open(io.BytesIO(i[1])).convert("RGB")), sorted(items)))
        out.append(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device))
    return out


def contact_sheet(rows: list[list[torch.Tensor]], path: Path) -> None:
    """Save rows of pictures `[3, h, w]` in -1..1 as one picture."""
    strips = [torch.cat([p.float().cpu().clamp(-1, 1) for p in row], 2) for row in rows]
    sheet = ((torch.cat(strips, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, quality=88)
