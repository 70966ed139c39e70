"""Stage 0 (CPU, a minute): pack the pictures, photographs and real clips that the later stages read.

    python gallery/training/prepare.py --source DATA --out build/training_data

`DATA` holds `images/caltech101_webp.tar` with `images/caltech101_index.csv` (Caltech-101, CC BY 4.0,
doi 10.22002/D1.20086), `photos/*.webp` and `video/clips.tar` with `video/clips_index.csv`; README.md beside this file
says where each comes from.
"""

import argparse
import csv
import io
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from data import CLASSES, read
from PIL import Image

OTHERS_PER_CLASS = 24  # pictures of classes that only the autoencoder sees
FRAME_SIDE = 160  # short side of a clip's frames
FRAME_WIDTH = 216  # at most
FRAMES_PER_CLIP = 120
CLIPS_HELD_OUT = ("intel_yes.mkv", "intel_walk.mkv", "mdn_flower.mp4")


def add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    out.addfile(entry, io.BytesIO(data))


def pack(out: tarfile.TarFile, name: str, image: Image.Image, quality: int = 85) -> None:
    """Add a picture as WebP."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "webp", quality=quality)
    add(out, name, buffer.getvalue())


def pictures(source: Path, out: tarfile.TarFile) -> list[dict[str, str]]:
    """Add all pictures of the classes and some of every other; returns their lines of the index."""
    wanted = {folder for folders in CLASSES.values() for folder in folders}
    seen: dict[str, int] = {}
    rows = []
    with (source / "images" / "caltech101_index.csv").open() as f:
        for row in csv.DictReader(f):
            seen[row["class"]] = seen.get(row["class"], 0) + 1
            if row["class"] in wanted or seen[row["class"]] <= OTHERS_PER_CLASS:
                rows.append({"file": row["file"], "class": row["class"], "split": row["split"]})
    with tarfile.open(source / "images" / "caltech101_webp.tar") as tar:
        members = {m.name.removeprefix("./"): m for m in tar if m.isfile()}
        for row in rows:
            add(out, "pictures/" + row["file"], read(tar, members[row["file"]]))
    return rows


def photos(source: Path, out: tarfile.TarFile) -> list[dict[str, str]]:
    """Add four squares of every photograph; returns their lines of the index."""
    rows = []
    for path in sorted((source / "photos").glob("*.webp")):
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        for i in range(4):
            x, y = (image.width - side) * i // 3, (image.height - side) * i // 3
            crop = image.crop((x, y, x + side, y + side)).resize((224, 224), Image.Resampling.LANCZOS)
            name = f"photo/{path.stem}_{i}.webp"
            pack(out, "pictures/" + name, crop)
            rows.append({"file": name, "class": "photo", "split": "train"})
    return rows


def frames_of(data: bytes, suffix: str) -> Iterator[Image.Image]:
    """Frames of an encoded clip; needs the extra `training`."""
    import imageio.v3 as iio

    for frame in iio.imiter(data, plugin="FFMPEG", extension=suffix):
        yield Image.fromarray(np.asarray(frame))


def shrink(frame: Image.Image) -> Image.Image:
    """A frame of 160 pixels on its short side, at most 216 x 160."""
    scale = FRAME_SIDE / min(frame.size)
    frame = frame.resize((round(frame.width * scale), round(frame.height * scale)), Image.Resampling.BICUBIC)
    left = max(0, (frame.width - FRAME_WIDTH) // 2)
    return frame.crop((left, 0, left + min(FRAME_WIDTH, frame.width), FRAME_SIDE))


def clips(source: Path, out: tarfile.TarFile) -> list[dict[str, str]]:
    """Add the first frames of every real clip; returns their lines of the index."""
    rows = []
    with tarfile.open(source / "video" / "clips.tar") as tar:
        for member in tar:
            name = Path(member.name).name
            if not member.isfile() or not name.endswith((".mp4", ".mkv")):
                continue
            count = 0
            for frame in islice(frames_of(read(tar, member), Path(name).suffix), FRAMES_PER_CLIP):
                pack(out, f"clips/{name}/{count:04d}.webp", shrink(frame), quality=75)
                count += 1
            split = "held_out" if name in CLIPS_HELD_OUT else "train"
            rows.append({"file": name, "class": "clip", "split": split, "frames": str(count)})
    return rows


def main() -> None:
    """Write `data.tar` and `index.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/training_data"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(args.out / "data.tar", "w") as out:
        rows = pictures(args.source, out) + photos(args.source, out) + clips(args.source, out)
    with (args.out / "index.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, ["file", "class", "split", "frames"])
        writer.writeheader()
        writer.writerows(rows)
    size = (args.out / "data.tar").stat().st_size / 2**20
    print(f"{len(rows)} pictures, photographs and clips, {size:.1f} MiB, in {args.out}")


if __name__ == "__main__":
    main()
