"""Keep packed weights in a nameless file until they are written, so that memory need not hold a model."""

from __future__ import annotations

import dataclasses
import mmap
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from onnx_bitnet.errors import OutputError, one_line

Record = TypeVar("Record", bound=Any)  # a dataclass

_WORTH = 1 << 20  # smaller arrays stay in memory
_CHUNK = 1 << 30  # the file is mapped in pieces of this size, since each takes a file descriptor


class Spill:
    """A temporary file of arrays. The system removes it with the last use, however the process ends.

    Args:
        folder: where the file is: on the disk that the output goes to; None for the system's own choice.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by __exit__
        self._maps: list[mmap.mmap] = []
        self._start = self._end = 0  # of the last map, and of what was written into it

    def __enter__(self) -> Spill:
        """Return the spill itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; arrays that were kept stay valid."""
        self._file.close()

    def keep(self, array: np.ndarray) -> np.ndarray:
        """Write an array to the file and return an equal one, read-only, that is mapped from there.

        Raises:
            OutputError: the disk is full.
        """
        if array.nbytes < _WORTH:
            return array
        try:
            offset = self._place(array.nbytes)
            self._file.seek(self._start + offset)
            self._file.write(np.ascontiguousarray(array).data.cast("B"))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot keep packed weights on disk: {one_line(error)}; free some space"
            ) from None
        return np.frombuffer(self._maps[-1], array.dtype, array.size, offset).reshape(array.shape)

    def keep_arrays(self, record: Record) -> Record:
        """Return a dataclass whose arrays are kept, see `keep`."""
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        arrays = {name: self.keep(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(record, **arrays)

    def _place(self, nbytes: int) -> int:
        """Return where in the last map the next array goes, having made room for it."""
        room = len(self._maps[-1]) if self._maps else 0
        if self._end + nbytes > room:
            self._start += room
            self._end = 0
            size = -(-max(nbytes, _CHUNK) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._file.truncate(self._start + size)  # sparse until written
            self._maps.append(
                mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=self._start)
            )
        offset = self._end
        self._end += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return offset

    def release(self) -> None:
        """Give the memory that the arrays take back to the system; they are read again when used."""
        for mapped in self._maps:
            give_back(mapped)


def give_back(mapped: mmap.mmap) -> None:
    """Give the memory of a read-only mapping back to the system, where the system can be told."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
