"""Read the header of a GGUF file: keys and values, and where each tensor lies.

The package `gguf` refuses a whole file for one tensor of a type that is not llama.cpp's own, as BitNet's are.
So the header is read here, and that package is asked only to decode ordinary types.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet.errors import ModelError, one_line

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Args:
        name: as the file gives it.
        shape: in NumPy's order: a weight is (N, K).
        kind: number of its type, see ggml.py.
        offset: of its first byte, from the beginning of the file.
        room: bytes until the next tensor or the end of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    room: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Args:
        path: the file.
        metadata: its keys and values.
        entries: its tensors.
    """

    path: Path
    metadata: dict[str, Any]
    entries: tuple[Entry, ...]


def is_gguf(path: Path) -> bool:
    """Tell a GGUF file by its first bytes, or by its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def read_header(path: Path) -> Header:
    """Read a GGUF file up to its tensors.

    Raises:
        ModelError: not such a file, of another version or byte order, or truncated.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from None
    return _Reader(path, data).header()


class _Reader:
    """Goes through the bytes of a header once."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise ModelError(f"{self._path}: not a GGUF file")
        version = self._scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(struct.pack("<I", version), "big") in _VERSIONS
            what = "is big-endian" if swapped else f"has GGUF version {version}"
            raise ModelError(f"{self._path}: {what}; only little-endian versions 2 and 3 can be read")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(self._count(pairs, 13)):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        found = [self._entry() for _ in range(self._count(tensors, 25))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self._path}: general.alignment is {alignment!r}; the file is damaged")
        start = -(-self._at // alignment) * alignment
        ends = sorted({*(start + offset for *_, offset in found), len(self._data)})
        following = dict(pairwise(ends))
        entries = []
        for name, shape, kind, offset in found:
            offset += start
            if offset >= len(self._data):
                raise self._truncated(f"tensor {name!r} begins at byte {offset}")
            entries.append(Entry(name, shape, kind, offset, following[offset] - offset))
        return Header(self._path, metadata, tuple(entries))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ModelError(f"{self._path}: tensor {name!r} has {dimensions} axes; the file is damaged")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ModelError(f"{self._path}: a value of unknown type {kind}; the file is damaged")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            return [
                value for (value,) in struct.iter_unpack(code, self._bytes(count * struct.calcsize(code)))
            ]
        read: Callable[[], Any] = self._string if kind == _STRING else lambda: self._value(kind)
        return [read() for _ in range(self._count(count, 8))]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8", "replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _count(self, count: int, least: int) -> int:
        """Check a count of things that take `least` bytes each, so that a damaged one ends here."""
        if count * least > len(self._data) - self._at:
            raise self._truncated(f"{count} more entries at byte {self._at}")
        return count

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self._truncated(f"{count} bytes wanted at byte {self._at}")
        part = self._data[self._at : end].tobytes()
        self._at = end
        return part

    def _truncated(self, what: str) -> ModelError:
        return ModelError(
            f"{self._path}: truncated or damaged: {what}, the file has {len(self._data)}; download it again"
        )
