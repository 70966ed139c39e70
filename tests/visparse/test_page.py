import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from visparse.measure.results import Record
from visparse.page import build_page, pictures, write_outputs
from visparse.page.numbers import psnr_text

LABELS = ("dense", "radial", "dense, 2 steps", "dense <again> (floor)")


def films(frames: int = 7, height: int = 32, width: int = 48) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 200, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    return {label: base + shift for label, shift in zip(LABELS, (0, 9, 30, 0), strict=True)}


def record() -> Record:
    facts = {"model": "tiny", "seed": 7, "dtype": "float32", "prompt": "a <cat> & a dog", "steps": 3, "repeats": 1}
    parts = {"seconds_per_step": 1.0, "seconds_text": 0.25, "seconds_denoise": 3.0, "seconds_decode": 0.5}
    quality = {"psnr": 33.21, "psnr_min": 31.5, "ssim": 0.9, "ssim_min": 0.8, "latent_error": 0.05, "identical": False}
    shared = {**facts, **parts, "tokens": 48, "heads": 2, "head_dim": 16}
    names = ("dense", "radial", "fewer-steps", "floor")
    rows = [
        {**shared, "plan": plan, "label": label, "seconds": seconds, "speedup": 9 / seconds, "dense_steps": 1}
        for plan, label, seconds in zip(names, LABELS, (9.0, 4.5, 4.0, 9.1), strict=True)
    ]
    rows[1] |= {"density": 0.125, "block_density": 0.1875, "run_block_density": 0.4, "ceiling": 2.5, "grid": [2, 4, 6]}
    for row in rows[1:]:
        row |= quality
    rows[3] |= {"identical": True, "psnr": 100.0, "psnr_min": 100.0}
    settings = {
        "prompt": facts["prompt"],
        "fps": 8.0,
        "num_frames": 7,
        "height": 32,
        "width": 48,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "attention_share_of_step": 0.5,
        "load_seconds": 1.0,
        "floor": "keys rolled",
        "notes": ["one <note>"],
    }
    return Record.collect("run", settings, rows)


class Reader(HTMLParser):
    """Counts open elements and keeps what the page shows and loads."""

    VOID = ("meta", "input", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_page_is_whole_and_loads_nothing():
    text = build_page(record(), films())
    page = Reader(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|//cdn", text)
    assert "prefers-color-scheme: dark" in text


def test_page_shows_the_numbers():
    text = Reader(build_page(record(), films())).text
    for wanted in ("2.00×", "2.50×", "12.5 %", "18.8 %", "40.0 %", "33.2 (31.5)", "0.9000 (0.8000)", "identical"):
        assert wanted in text, wanted
    for wanted in (
        "a <cat> & a dog",
        "one <note>",
        "float32",
        "seed 7",
        "2 × 4 × 6",
        "50% of a dense step",
        "keys rolled",
    ):
        assert wanted in text, wanted
    assert "radial: 3, of them 1 dense" in text


def test_film_moves_and_holds_every_variant():
    uri = re.search(r'url\("(data:image/[a-z]+;base64,[^"]+)"\)', build_page(record(), films()))[1]
    film = decode(uri)
    assert film.n_frames == 7
    assert film.size == (48 * 4, 32 * 2)


def test_outputs(tmp_path):
    path = write_outputs(tmp_path / "new", record(), films())
    names = sorted(file.name for file in path.parent.iterdir())
    kind = pictures.picture_kind()
    wanted = ["0-dense", "1-radial", "2-dense-2-steps", "3-dense-again-floor"]
    assert names == [*(f"{name}.{kind}" for name in wanted), "index.html", "result.json"]


def test_film_as_gif_where_webp_is_missing(monkeypatch):
    monkeypatch.setattr(pictures.features, "check", lambda name: False)
    data, kind = pictures.encode_film(films()["dense"], 8.0)
    assert kind == "gif"
    assert Image.open(io.BytesIO(data)).n_frames == 7
    assert pictures.encode_still(films()["dense"][0])[1] == "png"


def test_difference_and_its_amplification():
    made = films()
    values = pictures.difference(made["radial"], made["dense"])
    assert values.unique().tolist() == [9]
    assert pictures.difference(made["dense"], made["radial"]).unique().tolist() == [9]
    assert pictures.amplification([values]) == 16  # 9 x 16 = 144 fits, 9 x 32 does not
    assert pictures.amplification([values, values * 20]) == 1
    assert pictures.amplification([values * 0]) == 64
    painted = pictures.paint_difference(torch.tensor([[[0, 15, 200]]], dtype=torch.uint8), 16)
    assert painted[0, 0, 0].tolist() == [0, 0, 0]
    assert painted[0, 0, 2].tolist() == [255, 255, 255]
    assert 0 < painted[0, 0, 1].float().mean() < 255


def test_wide_frames_are_made_smaller():
    wide = torch.zeros(2, 100, 960, 3, dtype=torch.uint8)
    assert pictures.fit_frames(wide).shape == (2, 50, 480, 3)
    small = films()["dense"]
    assert pictures.fit_frames(small) is small


def test_stills_are_spread_from_first_to_last():
    assert pictures.pick_stills(4, 6) == [0, 1, 2, 3]
    assert pictures.pick_stills(17, 6) == [0, 3, 6, 10, 13, 16]
    assert pictures.pick_stills(9, 1) == [0]


def test_psnr_text():
    row = {"psnr": 40.0, "psnr_min": 38.04, "identical": False}
    assert psnr_text(row) == "40.0 (38.0)"
    assert psnr_text({**row, "psnr": 100.0}) == ">= 100 (38.0)"
    assert psnr_text({**row, "identical": True}) == "identical"
    assert psnr_text({}) == "–"


def test_wrong_input_is_named():
    some = films()
    del some["radial"]
    with pytest.raises(ValueError, match="films: no frames for radial"):
        build_page(record(), some)
    other = Record.collect("step", {}, [{"plan": "dense"}])
    with pytest.raises(ValueError, match="record: a page is made of kind 'run', got 'step'"):
        build_page(other, films())
