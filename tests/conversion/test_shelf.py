"""A shelf gives back what was put there, from memory while there is room and from files beyond."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_bitnet.conversion.shelf import Shelf
from onnx_bitnet.errors import DataError


def _batch(value):
    return {"a": np.full(64, value, np.uint8), "b": np.full((2, 32), -value, np.int8)}


def test_what_does_not_fit_is_in_files(tmp_path):
    shelf = Shelf(tmp_path, room=300)
    for number in range(4):
        shelf.put(number, _batch(number))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2", "3"]
    for number in (3, 0, 1):
        for name, array in shelf.take(number).items():
            np.testing.assert_array_equal(array, _batch(number)[name])
    assert [file.name for file in tmp_path.iterdir()] == ["2"], "nothing stays that was taken"
    shelf.put(0, _batch(5))
    assert [file.name for file in tmp_path.iterdir()] == ["2"], "there is room again"
    assert shelf.take(0)["b"][0, 0] == -5


def test_a_disk_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"cannot keep what layers read: .*; TMPDIR may say where"):
        Shelf(tmp_path / "absent", room=0).put(0, _batch(1))
