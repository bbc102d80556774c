"""Measurements are found again by content alone, whole or not at all, in a folder that stays small."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from onnx_bitnet import cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNX_BITNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_is_recalled_value_for_value(place):
    value = {"a": [0.1, 1e-300, float("inf")], "b": None, "c": "ä"}
    assert cache.recall("k") is None
    cache.keep("k", value)
    assert cache.recall("k") == value
    assert [file.name for file in place.iterdir()] == ["k.json"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:50] + b"\xff" + b[51:], lambda _: b"", lambda b: b + b" "]
)
def test_damaged_files_are_nothing_and_are_replaced(place, damage):
    cache.keep("k", list(range(100)))
    file = place / "k.json"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.recall("k") is None
    cache.keep("k", 2)
    assert cache.recall("k") == 2


def test_the_folder_stays_small_and_what_is_used_stays(place, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 3000)
    for index in range(6):
        cache.keep(f"k{index}", "x" * 900)
        os.utime(place / f"k{index}.json", (index, index))
        assert cache.recall("k0")  # is the last one used
    assert sum(file.stat().st_size for file in place.iterdir()) <= 3000
    assert cache.recall("k0")
    assert cache.recall("k1") is None


def test_it_can_be_switched_off_and_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ONNX_BITNET_CACHE", "off")
    cache.keep("k", 1)
    assert cache.folder() is None
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("ONNX_BITNET_CACHE")
    assert cache.folder() == tmp_path / "onnx_bitnet"
    cache.folder().write_text("a file in its place")
    cache.keep("k", 1)
    assert cache.recall("k") is None


def test_processes_that_write_at_once_leave_one_whole_value(place):
    program = "from onnx_bitnet import cache\nfor i in range(50): cache.keep('k', [i] * 20000)"
    writers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        found = cache.recall("k")
        assert found is None or found == [found[0]] * 20000
    assert [writer.returncode for writer in writers] == [0, 0]
    assert cache.recall("k") == [49] * 20000
    assert [file.name for file in place.iterdir()] == ["k.json"]


def test_batches_differ_by_name_type_shape_and_value():
    x = np.arange(6, dtype=np.int32)
    different = [
        [{"x": x}],
        [{"y": x}],
        [{"x": x.astype(np.uint32)}],
        [{"x": x.reshape(2, 3)}],
        [{"x": x}, {"x": x}],
        [{"x": x[:3]}, {"x": x[3:]}],
        [{"x": x + 1}],
        [{"x": x, "y": x}],
        [{"x": np.array(["a", "b"], object)}],
        [{"x": np.array(["a", "c"], object)}],
    ]
    assert len({cache.digest_of_batches(batches) for batches in different}) == len(different)
    assert cache.digest_of_batches([{"x": x[::2]}]) == cache.digest_of_batches([{"x": x[::2].copy()}])


def test_keys_depend_on_instruction_sets_and_what_is_said(monkeypatch):
    keys = {cache.key_of({"what": what}) for what in ("a", "b")}
    assert keys == {cache.key_of({"what": what}) for what in ("b", "a")}
    monkeypatch.setenv("ONNX_BITNET_ISA", "scalar")
    assert cache.key_of({"what": "a"}) not in keys
