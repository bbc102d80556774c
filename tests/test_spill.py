"""Arrays kept on disk: equal, mapped, and gone with their user."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from onnx_bitnet import spill
from onnx_bitnet.errors import OutputError
from onnx_bitnet.spill import Spill


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_arrays_come_back_equal_and_the_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_CHUNK", 5 << 20)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, np.uint8) for shape in ((1, 1024, 1100), (3, 700, 800), (6 << 20,))]
    arrays += [rng.standard_normal((2, 300, 1000)).astype(np.float32), np.ones((1, 2, 3), np.float16)]
    with Spill(tmp_path) as kept:
        got = [kept.keep(array) for array in arrays]
        assert list(tmp_path.iterdir()) == []
        kept.release()
    for array, again in zip(arrays, got, strict=True):
        assert again.dtype == array.dtype
        assert np.array_equal(again, array)
    assert not got[0].flags.writeable
    assert got[-1] is arrays[-1]  # too small to be worth it


def test_views_are_kept_as_they_are_seen(tmp_path):
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024).T
    with Spill(tmp_path) as kept:
        assert np.array_equal(kept.keep(array), array)


def test_memory_is_given_back(tmp_path):
    with Spill(tmp_path) as kept:
        got = [kept.keep(np.full(8 << 20, index, np.uint8)) for index in range(16)]
        before = resident()
        assert [int(array[::4096].sum()) for array in got] == [2048 * index for index in range(16)]
        kept.release()
        assert resident() - before < 32 << 20  # of 128 MB read
        assert int(got[3][12345]) == 3


def test_a_full_disk_is_one_clear_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Spill(tmp_path) as kept:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(OutputError, match=r"cannot keep packed weights on disk: .*; free some space"):
                kept.keep(np.zeros(2 << 20, np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
