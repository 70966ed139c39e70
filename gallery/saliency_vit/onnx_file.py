"""Read the tensors and the nodes of an ONNX file: protocol buffers by hand, so that no package is needed for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64}  # TensorProto.DataType


@dataclass
class Node:
    """An operation of the graph.

    Attributes:
        name, kind: its name, and what it computes.
        inputs: names of tensors.
    """

    name: str = ""
    kind: str = ""
    inputs: list[str] = field(default_factory=list)


def read_onnx(data: bytes) -> tuple[dict[str, Tensor], list[Node]]:
    """Return the stored tensors by name, and the nodes.

    Args:
        data: the file.

    Raises:
        ValueError: it is no ONNX file, or a tensor is stored in a form that this reader does not know.
    """
    view = memoryview(data)
    graphs = [value for number, value in _fields(view) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ValueError(f"data: wanted an ONNX model with one graph, got {len(graphs)}; is the download whole?")
    tensors, nodes = {}, []
    for number, value in _fields(graphs[0]):
        if number == 5 and not isinstance(value, int):
            name, tensor = _tensor(value)
            tensors[name] = tensor
        elif number == 1 and not isinstance(value, int):
            nodes.append(_node(value))
    return tensors, nodes


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Give the number and the value of every field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"data: unknown wire type {wire} at byte {at}; this is no ONNX file")
        if at + size > len(data):
            raise ValueError(f"data: a field ends {at + size - len(data)} bytes behind the end; is the download whole?")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read an integer of seven bits a byte; return it and the place behind it."""
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("data: it ends inside a number; is the download whole?")


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, dtype, raw = "", 0, memoryview(b"")
    for number, value in _fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8 and not isinstance(value, int):
            name = str(value, "utf-8")
        elif number == 9 and not isinstance(value, int):
            raw = value
    if dtype not in _DTYPES or not raw:
        raise ValueError(
            f"tensor {name!r}: wanted raw data of type {list(_DTYPES)}, got type {dtype}, {len(raw)} bytes"
        )
    return name, torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]).view(shape)


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _node(data: memoryview) -> Node:
    node = Node()
    for number, value in _fields(data):
        if isinstance(value, int):
            continue
        if number == 1:
            node.inputs.append(str(value, "utf-8"))
        elif number == 3:
            node.name = str(value, "utf-8")
        elif number == 4:
            node.kind = str(value, "utf-8")
    return node
