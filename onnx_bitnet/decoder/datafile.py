"""The file of a model's large tensors, written as they are made: none of them is ever held as a whole."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir

PAGE = 4096
_TYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.float16): ir.DataType.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): ir.DataType.BFLOAT16,
    np.dtype(np.uint8): ir.DataType.UINT8,
}


class DataFile:
    """Appends tensors to the data file of a model, each from a page boundary on, so that it can be mapped.

    Args:
        file: opened for writing; its folder is the model's.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._path = Path(file.name)
        self.digests: dict[str, str] = {}
        """SHA-256 of the bytes of each tensor that `add` was given."""

    def add(self, name: str, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> ir.TensorProtocol:
        """Write a tensor that comes in parts, in order, and return what refers to it.

        Tensors below a page stay in memory, and so in the model file.

        Args:
            name: of the tensor.
            shape: of the whole.
            parts: arrays of one type that make up the whole when their bytes are joined; at least one.
        """
        parts = (np.ascontiguousarray(part).reshape(-1) for part in parts)
        first = next(parts)
        size = math.prod(shape) * first.itemsize
        if size < PAGE:
            whole = np.concatenate([first, *parts])
            self.digests[name] = hashlib.sha256(whole.view(np.uint8).data).hexdigest()
            return ir.tensor(whole.reshape(shape), name=name)
        offset = self._next_page()
        self._file.seek(offset)
        digest = hashlib.sha256()
        for part in chain((first,), parts):
            data = part.view(np.uint8).data
            digest.update(data)
            self._file.write(data)
        written = self._file.tell() - offset
        assert written == size, f"{name}: {written} bytes written, {size} meant"
        self.digests[name] = digest.hexdigest()
        return self._refer(name, offset, shape, first.dtype)

    def reserve(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, ir.TensorProtocol]:
        """Make room for a tensor of uint8; return it mapped, to be filled in any order, and its reference."""
        offset, size = self._next_page(), math.prod(shape)
        self._file.flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash where a map is written
            os.posix_fallocate(self._file.fileno(), offset, size)
        self._file.truncate(offset + size)
        self._file.seek(0, os.SEEK_END)
        room = np.memmap(self._path, np.uint8, "r+", offset, shape)
        return room, self._refer(name, offset, shape, room.dtype)

    def _next_page(self) -> int:
        return -(-self._file.tell() // PAGE) * PAGE

    def _refer(self, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self._path.name,
            offset,
            math.prod(shape) * dtype.itemsize,
            _TYPES[dtype],
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self._path.parent),
        )
