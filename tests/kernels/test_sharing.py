"""Equal layers hold the same memory, however many threads make and end them."""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernels import run_portable

from onnx_bitnet import _native, reference


def layer(seed: int = 0, form: str = "i2s", **options: object) -> _native.MatMul:
    rng = np.random.default_rng(seed)
    weight = reference.PACK[form](rng.integers(0, 3, (1, 192, 640), np.uint8))
    scale = np.full((1, 1, 1), 0.5, np.float32)
    return _native.MatMul(weight, scale, None, None, k=640, format=form, **options)


def added(before: tuple[int, int]) -> int:
    gc.collect()
    return _native.shared_totals()[0] - before[0]


def test_equal_layers_share_until_the_last_one_ends() -> None:
    before = _native.shared_totals()
    first = layer()
    assert added(before) == 3  # panels, scales, bias
    assert _native.shared_totals()[1] - before[1] == 192 * 160 + 2 * 192 * 4
    second = layer()
    assert added(before) == 3
    x = np.random.default_rng(1).normal(size=(2, 640)).astype(np.float32)
    y = first(x)
    del first
    assert added(before) == 3
    assert np.array_equal(second(x), y)
    del second
    assert _native.shared_totals() == before


@pytest.mark.parametrize("form", ["tl1", "tl2", "t5"])
def test_formats_share(form: str) -> None:
    before = _native.shared_totals()
    layers = [layer(form="i2s"), layer(form=form, isa="scalar")]  # where no kernel reads t5 as it is
    assert added(before) == 3
    del layers


def test_what_differs_is_not_shared() -> None:
    before = _native.shared_totals()
    layers = [layer(0), layer(1)]
    assert added(before) == 4  # the scales and the biases are equal
    layers.append(layer(0, activation_bits=16))
    assert added(before) == 5  # 16 bits need the sums of codes
    del layers
    assert _native.shared_totals() == before


squeezes = pytest.mark.skipif(
    _native.find("dot", "t5") == "scalar" or _native.find("dot", "i2s") == "amx",
    reason="this CPU has no kernel for panels of t5",
)


def panel_bytes(**options: object) -> int:
    """Return how many bytes more than a layer that is there already one layer holds."""
    before = _native.shared_totals()[1]
    made = layer(**options)
    after = _native.shared_totals()[1]
    del made
    return after - before


@squeezes
def test_t5_stays_denser() -> None:
    i2s, tables = 192 * 160, 2 * 192 * 4
    for form in ("i2s", "tl1", "tl2"):
        assert panel_bytes(form=form) == i2s + tables
    assert panel_bytes(form="t5") == i2s * 4 // 5 + tables
    assert panel_bytes(form="t5", isa="scalar") == i2s + tables
    first = layer(form="t5")
    assert panel_bytes(form="t5") == 0
    del first


def test_a_refused_layer_leaves_nothing() -> None:
    before = _native.shared_totals()
    weight = np.full((1, 64, 10), 255, np.uint8)
    with pytest.raises(ValueError, match="above 242"):
        _native.MatMul(weight, np.ones((1, 1, 1), np.float32), None, None, k=50, format="t5")
    assert _native.shared_totals() == before


def test_many_threads(tmp_path: Path) -> None:
    """Under ThreadSanitizer: no race, no wrong result, nothing left."""
    if shutil.which("gcc") is None or run_portable.sanitizer("gcc", "thread") is None:
        pytest.skip("needs gcc and its libtsan")
    program = tmp_path / "sharing"
    run_portable.build(program, "gcc", ["-g", "-O1", "-fsanitize=thread", "-pthread"], source="sharing.c")
    alone = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # no second sanitizer
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "6 pieces for three layers of two weights",
        "0 wrong, 0 pieces left, answers differ",
    ]


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc/self/pagemap")
def test_only_pages_of_a_file_are_dropped(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    program, data = tmp_path / "dropping", tmp_path / "data"
    sources = [Path(__file__).with_name("dropping.c"), run_portable.EXT / "ops/load.c"]
    command = ["gcc", *run_portable.BASE, f"-I{run_portable.EXT}", "-pthread", *sources, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    data.write_bytes(np.random.default_rng(0).bytes(64 * mmap.PAGESIZE))
    done = subprocess.run([program, data], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
