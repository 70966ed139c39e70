"""All stages of training on made-up pictures, two steps each, on the CPU; and what must never be trained on."""

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

Script = Callable[[str], ModuleType]


def picture(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "webp")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path, script: Script) -> Path:
    """What prepare.py reads: a picture of every class, and of six classes a second, held-out one."""
    folder = tmp_path / "source"
    names = [folders[0] for folders in script("data").CLASSES.values()]
    names = [(name, "train") for name in names] + [(name, "held_out") for name in names[:6]]
    rows = [(f"{name}/{i}.webp", name, split) for i, (name, split) in enumerate(names)]
    write_tar(folder / "images" / "caltech101_webp.tar", {"./" + r[0]: webp(picture(i)) for i, r in enumerate(rows)})
    with (folder / "images" / "caltech101_index.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("file", "class", "split"), *rows])
    (folder / "photos").mkdir()
    picture(99).save(folder / "photos" / "photo.webp")
    write_tar(folder / "video" / "clips.tar", {"clips/train.mp4": b"1", "clips/intel_walk.mkv": b"2", "notes": b""})
    return folder


@pytest.fixture
def small(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels, small batches, two steps a stage, no clips to decode, no GPU."""
    prepare, autoencoder, transformer, denoiser = map(script, ("prepare", "autoencoder", "transformer", "denoiser"))
    monkeypatch.setattr(prepare, "frames_of", lambda data, suffix: (picture(ord(data) + i) for i in range(18)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # a stage sets it
    for module in (autoencoder, transformer):
        monkeypatch.setattr(module, "setup", lambda: (torch.device("cpu"), 0, 1))
        monkeypatch.setattr(module, "until", lambda seconds, device: iter((0.0, 0.9 * seconds)))
    monkeypatch.setattr(transformer, "BATCH", {1: 4, 5: 2})
    autoencoder.CONFIG.update(base_dim=8, decoder_base_dim=8)
    denoiser.CONFIG.update(num_layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=32, freq_dim=32)


def call(script: Script, monkeypatch: pytest.MonkeyPatch, stage: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, words)])
    script(stage).main()


@pytest.mark.usefixtures("small")
def test_all_stages(script: Script, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, vae, out, published = (tmp_path / name for name in ("data", "vae", "out", "published"))
    call(script, monkeypatch, "prepare", "--source", source, "--out", data)
    with (data / "index.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 18 + 4 + 2  # pictures, squares of the photograph, clips
    assert {r["file"]: (r["split"], r["frames"]) for r in rows if r["class"] == "clip"} == {
        "train.mp4": ("train", "18"),
        "intel_walk.mkv": ("held_out", "18"),
    }

    call(script, monkeypatch, "autoencoder", "--data", data, "--out", vae, "--batch", 4, "--no-compile")
    measured = json.loads((vae / "training.json").read_text())
    assert measured["steps"] == 2
    assert all(0 < measured[key] < 60 for key in ("held_out_pictures_db", "worst_db", "held_out_clips_db"))

    options = ["--data", data, "--out", out, "--bank", 32, "--sheet-steps", 1, "--no-compile"]
    call(script, monkeypatch, "transformer", *options, "--vae", vae, "--stages", "1:1,5:1", "--decay", 0)
    trained_vae = out / "pipeline" / "vae"
    first = AutoencoderKLWan.load_config(trained_vae)
    before = torch.load(out / "state.pt", weights_only=True)
    call(script, monkeypatch, "transformer", *options, "--vae", trained_vae, "--stages", "5g:1")
    second = AutoencoderKLWan.load_config(trained_vae)
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 6  # two stages, then one that resumed
    assert [(h["step"], h["frames"], h["guided"]) for h in record["history"]] == [(5, 5, True), (6, 5, True)]
    after = torch.load(out / "state.pt", weights_only=True)
    assert any(not torch.equal(a, before["model"][name]) for name, a in after["model"].items())
    assert first["latents_std"] != [1.0] * len(first["latents_std"])
    assert (second["latents_mean"], second["latents_std"]) == (first["latents_mean"], first["latents_std"])

    call(script, monkeypatch, "publish", "--pipeline", out / "pipeline", "--out", published)
    assert "_name_or_path" not in json.loads((published / "vae" / "config.json").read_text())
    pipe = WanPipeline.from_pretrained(published)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        "a pizza, the camera zooms in",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert video.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0


def test_publish_refuses_what_is_too_large(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipeline"
    for name in ("model_index.json", "tokenizer/tokenizer_config.json", "vae/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    monkeypatch.setattr(script("publish"), "LIMIT_MB", 1e-5)
    with pytest.raises(SystemExit, match="too large for the wheel"):
        call(script, monkeypatch, "publish", "--pipeline", folder, "--out", tmp_path / "published")


def black_and_white() -> SimpleNamespace:
    """Pictures, the held-out ones white and the others black."""
    held_out = torch.tensor([False, True] * 6)
    pixels = torch.zeros(12, 3, 200, 216, dtype=torch.uint8)
    pixels[held_out] = 255
    return SimpleNamespace(pixels=pixels, held_out=held_out, kind=torch.arange(12) // 2)


@pytest.mark.parametrize("frames", [1, 9])
def test_bank_holds_no_held_out_picture(script: Script, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    latents = script("latents")
    monkeypatch.setattr(latents, "encode", lambda vae, clips: torch.cat([clips, clips], 1))
    generator = torch.Generator().manual_seed(0)

    def values(pictures: SimpleNamespace) -> list[float]:
        return latents.LatentBank(None, pictures, frames, 32, 60.0, generator).latents.sign().unique().tolist()

    pictures = black_and_white()
    assert values(pictures) == [-1.0]
    pictures.held_out = ~pictures.held_out
    assert values(pictures) == [1.0]


def test_bank_gives_captions_of_its_pictures(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = script("latents")
    monkeypatch.setattr(latents, "encode", lambda vae, clips: torch.cat([clips, clips], 1))
    pictures = black_and_white()
    pictures.pixels = (pictures.kind * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 200, 216)
    generator = torch.Generator().manual_seed(0)
    x, caption = latents.LatentBank(None, pictures, 1, 256, 60.0, generator)(64, generator)
    kind = ((x[:, 0, 0, 0, 0] + 1) * 127.5 / 20).round().long()
    assert torch.equal(caption // 7, kind)
    assert len(kind.unique()) == 6


def test_autoencoder_batches_hold_no_held_out_picture(script: Script) -> None:
    clip = torch.zeros(20, 3, 40, 60, dtype=torch.uint8)
    pictures, generator = black_and_white(), torch.Generator().manual_seed(0)
    batches = script("autoencoder").Batches(pictures, [clip], generator)
    assert batches(16, 9).shape == (16, 3, 9, 32, 32)
    assert batches(64, 9).max() < 0
    pictures.held_out = ~pictures.held_out
    assert script("autoencoder").Batches(pictures, [clip], generator)(4, 9).max() > 0


@pytest.fixture
def encoded() -> bytes:
    """A clip of 5 frames, 64 x 48 pixels, as MP4."""
    iio = pytest.importorskip("imageio.v3", reason="imageio is not installed (pip install -e .[training])")
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (pip install -e .[training])")
    frames = np.stack([np.asarray(picture(i, 64, 48)) for i in range(5)])
    return iio.imwrite("<bytes>", frames, plugin="FFMPEG", extension=".mp4", fps=8)


def test_real_clips_are_decoded(script: Script, encoded: bytes) -> None:
    frames = list(script("prepare").frames_of(encoded, ".mp4"))
    assert [f.size for f in frames] == [(64, 48)] * 5
    assert np.abs(np.asarray(frames[3], dtype=float) - np.asarray(picture(3, 64, 48))).mean() < 25


@pytest.mark.parametrize(
    ("size", "wanted"), [((640, 360), (216, 160)), ((100, 100), (160, 160)), ((90, 160), (160, 160))]
)
def test_frames_of_real_clips_are_shrunk(script: Script, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert script("prepare").shrink(Image.new("RGB", size)).size == wanted


def test_learning_rate(script: Script) -> None:
    schedule = script("loop").schedule
    assert schedule(0.0, 0) == pytest.approx(0.01)
    assert schedule(0.5, 1000) == 1.0
    assert schedule(0.775, 1000) == pytest.approx(0.5)
    assert schedule(1.0, 1000) == pytest.approx(0.01)
    assert schedule(0.999, 1000, decay=1e-9) == 1.0


def test_averages_follow_the_weights(script: Script) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    weights = script("weights").Weights([weight], [torch.optim.SGD([weight], lr=1.0)], rate=0.5, keep=0.1)
    weights.step(0.25 * weight.sum(), factor=0.5)  # 1 - 0.5 * 0.5 * 0.25
    assert weight.item() == pytest.approx(0.9375)
    assert weights.average[0].item() == pytest.approx(0.1 * 1 + 0.9 * 0.9375)
    weights.swap_average()
    assert weight.item() == pytest.approx(0.1 * 1 + 0.9 * 0.9375)
    assert weights.average[0].item() == pytest.approx(0.9375)


def test_stages_of_the_command_line(script: Script) -> None:
    assert script("stages").parse_stages("1:600,9g:0.5") == [(1, False, 600.0), (9, True, 0.5)]


def test_a_loop_ends_when_its_time_is_over(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = script("loop")
    clock = iter((100.0, 100.0, 101.5, 102.9, 103.0))
    monkeypatch.setattr(loop.time, "time", lambda: next(clock))
    assert list(loop.until(3.0, torch.device("cpu"))) == pytest.approx([0.0, 1.5, 2.9])
