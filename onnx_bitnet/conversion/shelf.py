"""A place for batches of arrays between two runs: memory as long as there is room, then files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from onnx_bitnet.errors import DataError, one_line

_ROOM = 256 << 20  # bytes


class Shelf:
    """Batches by number.

    Args:
        folder: an empty one for what memory has no room for.
        room: bytes of arrays that may lie in memory.
    """

    def __init__(self, folder: Path, room: int = _ROOM) -> None:
        self._folder, self._room = folder, room
        self._here: dict[int, dict[str, Any]] = {}

    def put(self, number: int, batch: dict[str, Any]) -> None:
        """Keep a batch, whose arrays nobody changes, until it is taken.

        Raises:
            DataError: the disk is full.
        """
        size = _size(batch)
        if size <= self._room:
            self._here[number] = batch
            self._room -= size
            return
        path = self._folder / str(number)
        try:
            with path.open("wb") as file:
                pickle.dump(batch, file, protocol=5)
        except OSError as error:
            raise DataError(
                f"{path}: cannot keep what layers read: {one_line(error)}; TMPDIR may say where"
            ) from None

    def take(self, number: int) -> dict[str, Any]:
        """Return a batch that was put, which is not kept any longer."""
        batch = self._here.pop(number, None)
        if batch is not None:
            self._room += _size(batch)
            return batch
        path = self._folder / str(number)
        with path.open("rb") as file:
            found: dict[str, Any] = pickle.load(file)
        path.unlink()
        return found


def _size(batch: dict[str, Any]) -> int:
    return sum(array.nbytes for array in batch.values())
