"""Fixtures for kernel tests: buffers that end at a page which may not be touched."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

CANARY = bytes([0xA5]) * 64
PROT_NONE = 0


@pytest.fixture
def guarded() -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Copy an array to the end of a mapping: touching what follows crashes, writing before it fails."""
    broken = []

    def check(memory: mmap.mmap, offset: int) -> None:
        before = memory[max(offset - len(CANARY), 0) : offset]
        if not CANARY.startswith(before):
            broken.append(before)

    def copy(array: np.ndarray) -> np.ndarray:
        usable = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
        _forbid(memory, usable)
        offset = usable - array.nbytes
        before = min(offset, len(CANARY))
        memory[offset - before : offset] = CANARY[:before]
        out = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        out[...] = array
        weakref.finalize(out, check, memory, offset)
        return out

    yield copy
    assert not broken, "a kernel wrote before its buffer"


def _forbid(memory: mmap.mmap, start: int) -> None:
    """Make the page at `start` fault when it is touched."""
    if sys.platform == "win32":
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
        raise OSError("mprotect failed")
