"""The tensors of a safetensors checkpoint in one file or several, mapped and read one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet.errors import ModelError, one_line

INDEX = "model.safetensors.index.json"
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
_WAY_OUT = "download the checkpoint again"


class Shards:
    """All tensors of a checkpoint by name.

    Args:
        path: a folder, a safetensors file, or the index of a sharded checkpoint.

    Raises:
        ModelError: no tensors there, a shard or a tensor missing, or a file damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        index = path / INDEX if path.is_dir() else path
        if index.name.endswith(".index.json") and index.is_file():
            expected = _read_index(index)
        else:
            expected = {}
        files = sorted(set(expected.values())) or _files(path)
        self._files = {}
        for name in files:
            handle = _open(self.folder / name)
            self._files.update(dict.fromkeys(handle.keys(), handle))
        lost = sorted(set(expected) - set(self._files))
        if lost:
            raise ModelError(
                f"{path}: {len(lost)} of {len(expected)} tensors are missing from their shards, the first is "
                f"{lost[0]!r}; {_WAY_OUT}"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a tensor as safetensors spells it: F32, BF16, U8."""
        return str(self._files[name].get_slice(name).get_dtype())

    def array(self, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
            ModelError: its type has no NumPy equivalent.
        """
        try:
            array: np.ndarray = self._files[name].get_tensor(name)
        except Exception as error:  # the library raises its own class for this, TypeError or KeyError
            raise ModelError(f"{self.path}: tensor {name!r} cannot be read: {one_line(error)}") from None
        return array


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text())["weight_map"]
        if not isinstance(names, dict) or not names:
            raise ValueError("weight_map is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not an index of a checkpoint: {one_line(error)}; {_WAY_OUT}") from None
    for shard in sorted(set(names.values())):
        if not (path.parent / shard).is_file():
            count = sum(name == shard for name in names.values())
            raise ModelError(
                f"{path.parent / shard}: this shard with {count} of {len(names)} tensors is missing; "
                f"{_WAY_OUT}"
            )
    return names


def _files(path: Path) -> list[str]:
    """Return the safetensors files there, after checking that no numbered part is missing."""
    names = sorted(file.name for file in path.glob("*.safetensors")) if path.is_dir() else [path.name]
    if not names:
        raise ModelError(f"{path}: holds no .safetensors file; give the folder of a checkpoint, or a file")
    folder = path if path.is_dir() else path.parent
    for match in filter(None, map(_PART.fullmatch, names)):
        for part in range(1, int(match["parts"]) + 1):
            name = f"{match['stem']}-{part:05}-of-{match['parts']}.safetensors"
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name}: this shard is missing; {_WAY_OUT}")
            if name not in names:
                raise ModelError(f"{path}: is one of {int(match['parts'])} shards; give the folder {folder}")
    return names


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModelError(f"{path}: reading it needs a package: pip install 'onnx-bitnet[text]'") from error
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: truncated, or not safetensors: {one_line(error)}; {_WAY_OUT}") from None
