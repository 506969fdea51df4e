"""Reads GGUF, the file format of llama.cpp: a head of named values, then tensors, some of them quantised.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only what the tests need is read: version 3,
float tensors, and the quantisations Q4_1 and Q8_0, whose blocks hold 32 numbers each.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8
_BLOCK = 32
_BLOCK_BYTES = {_Q4_1: 20, _Q8_0: 34}


class Place(NamedTuple):
    """Where a tensor stands in its file."""

    shape: tuple[int, ...]
    """The slowest dimension first, as numpy has it."""
    kind: int
    start: int


class Gguf(NamedTuple):
    path: Path
    values: dict[str, Any]
    tensors: dict[str, Place]

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor in float32."""
        shape, kind, start = self.tensors[name]
        count = math.prod(shape)
        if kind in (_F32, _F16):
            width = np.float32 if kind == _F32 else np.float16
            flat = np.fromfile(self.path, width, count, offset=start).astype(np.float32)
        else:
            size = count // _BLOCK * _BLOCK_BYTES[kind]
            blocks = np.fromfile(self.path, np.uint8, size, offset=start).reshape(-1, _BLOCK_BYTES[kind])
            flat = (_from_q4_1 if kind == _Q4_1 else _from_q8_0)(blocks)
        return flat.reshape(shape)


def read(path: Path) -> Gguf:
    """The head of a file; tensors are read when they are asked for. The file may end within its tensors."""
    with path.open("rb") as f:
        magic, version, tensors, values = struct.unpack("<4sIQQ", f.read(24))
        assert (magic, version) == (b"GGUF", 3), (magic, version)
        named = dict(_named_value(f) for _ in range(values))
        places = dict(_place(f) for _ in range(tensors))
        align = named.get("general.alignment", 32)
        data = -(-f.tell() // align) * align
    return Gguf(path, named, {n: p._replace(start=data + p.start) for n, p in places.items()})


def _named_value(f: BinaryIO) -> tuple[str, Any]:
    name = _string(f)
    (kind,) = struct.unpack("<I", f.read(4))
    return name, _value(f, kind)


def _value(f: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(f)
    if kind == _ARRAY:
        inner, count = struct.unpack("<IQ", f.read(12))
        if inner in _NUMBERS:
            packed = f"<{count}{_NUMBERS[inner]}"
            return list(struct.unpack(packed, f.read(struct.calcsize(packed))))
        return [_value(f, inner) for _ in range(count)]
    packed = "<" + _NUMBERS[kind]
    return struct.unpack(packed, f.read(struct.calcsize(packed)))[0]


def _string(f: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", f.read(8))
    return f.read(length).decode()


def _place(f: BinaryIO) -> tuple[str, Place]:
    name = _string(f)
    (dimensions,) = struct.unpack("<I", f.read(4))
    shape = struct.unpack(f"<{dimensions}Q", f.read(8 * dimensions))
    kind, start = struct.unpack("<IQ", f.read(12))
    return name, Place(tuple(reversed(shape)), kind, start)


def _from_q4_1(blocks: Any) -> Any:
    """A scale and a minimum in half precision, then 32 numbers of four bits: the low halves of 16 bytes come first."""
    scale, least = (blocks[:, i : i + 2].view(np.float16).astype(np.float32) for i in (0, 2))
    quanta = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * quanta + least


def _from_q8_0(blocks: Any) -> Any:
    """A scale in half precision, then 32 numbers of eight bits with a sign."""
    return blocks[:, :2].view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
