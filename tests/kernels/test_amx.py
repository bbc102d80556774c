"""The AMX kernels on any CPU with AVX512-VNNI: their sources, compiled against an emulation of the tiles."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernels.test_kernels import TOP, Guarded, dot_shapes, expected_dot, run_dot

from onnx_bitnet import _native
from onnx_bitnet.kernels import Kernel

HERE = Path(__file__).parent
EXT = HERE.parents[1] / "ext"
KERNELS = [Kernel("dot", form, "amx", runs_here=True, chosen=False) for form in ("i2s", "w4", "w8")]
INIT = np.zeros(64, np.uint8)
# Another library's tiles: palette 1, 8 rows of 32 bytes in each.
FOREIGN = np.array([1] + 15 * [0] + 8 * [32, 0] + 16 * [0] + 8 * [8] + 8 * [0], np.uint8)


class DotArgs(ctypes.Structure):
    """bn_dot_args of ext/kernel.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panel", "q", "acc")),
        *((name, ctypes.c_size_t) for name in ("q_stride", "rows", "panels", "steps", "group_steps")),
    )


class TilesArgs(ctypes.Structure):
    """bn_tiles_args of ext/kernel.h."""

    _fields_ = (("config", ctypes.c_uint8 * 64), ("back", ctypes.c_int))


class Emulated:
    """The emulated kernels; `config` is what their thread has loaded, as sttilecfg stores it."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.bn_emulated_state.restype = ctypes.c_void_p

    @property
    def config(self) -> np.ndarray:
        state = self._library.bn_emulated_state()
        return np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(state))

    def dot(
        self,
        panel: np.ndarray,
        q: np.ndarray,
        acc: np.ndarray,
        *,
        panels: int,
        group_steps: int,
        isa: str,
        format: str,
    ) -> None:
        rows, length = q.shape
        tiles = TilesArgs()
        self._library.bn_tiles_config_amx(ctypes.byref(tiles))
        pointers = (panel.ctypes.data, q.ctypes.data, acc.ctypes.data)
        getattr(self._library, f"bn_dot_{format}_{isa}")(
            ctypes.byref(DotArgs(*pointers, length, rows, panels, length // 16, group_steps))
        )
        tiles.back = 1
        self._library.bn_tiles_config_amx(ctypes.byref(tiles))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if not dict(_native.isas()).get("avx512vnni"):
        pytest.skip("this CPU lacks AVX512-VNNI, which the AMX kernels use beside the tiles")
    if shutil.which("gcc") is None or "amx" not in dict(_native.isas()):
        pytest.skip("needs gcc 11 or newer")
    library = tmp_path_factory.mktemp("amx") / "amx.so"
    rows = re.findall(r'^BN_ISA\((\w+),\s*"([^"]*)"', (EXT / "isa.inc").read_text(), re.M)
    flags = ["-O1", "-g", "-std=c11", "-shared", "-fPIC", f"-I{EXT}", *dict(rows)["amx"].split()]
    macros = [f"-DBN_HAVE_{name}={int(name in dict(_native.isas()))}" for name, _ in rows]
    sources = [*EXT.glob("kernels/*_amx.c"), *EXT.glob("kernels/dot_*_avx512vnni.c")]
    command = ["gcc", *flags, *macros, "-include", HERE / "amx_emulated.h", *sources, "-o", library]
    subprocess.run(command, check=True)
    return Emulated(library)


def shapes() -> Iterator[tuple[int, int, int, int]]:
    """Yield (m, n, k, block_size) as for all kernels, then around the edges of tiles."""
    yield from dot_shapes()
    for m in (*range(1, 71), 96, 97, 100, 129):
        yield m, 16 * (m % 8) + 7, 16 * (m % 11) + 64, 0
    for m in (5, 16, 17, 31, 32, 37):
        for k in range(16, 400, 16):
            yield m, 80, k, 0
        for block_size in (16, 32, 48, 64, 80, 112, 128, 256):
            yield m, 64, 300, block_size


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_equals_reference(emulated: Emulated, guarded: Guarded, kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    for m, n, k, block_size in shapes():
        codes = rng.integers(0, TOP[kernel.format] + 1, (n, k), np.uint8)
        q = rng.integers(-128, 128, (m, k)).astype(np.int8)
        got = run_dot(guarded, emulated.dot, kernel, codes, q, block_size)
        assert np.array_equal(got, expected_dot(codes, q, block_size)), (m, n, k, block_size)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("q", [127, -128])
def test_does_not_overflow(emulated: Emulated, guarded: Guarded, kernel: Kernel, q: int) -> None:
    code, longest = TOP[kernel.format], 2**18 if kernel.format == "i2s" else 2**16
    for m, n, k in ((5, 16, longest), (33, 17, 8192)):
        codes, x = np.full((n, k), code, np.uint8), np.full((m, k), q, np.int8)
        assert (run_dot(guarded, emulated.dot, kernel, codes, x, 0) == code * q * k).all(), (m, n, k)


@pytest.mark.parametrize("config", [INIT, FOREIGN], ids=["without tiles", "with tiles of its own"])
@pytest.mark.parametrize("m", [4, 5, 40])
def test_leaves_the_thread_its_configuration(
    emulated: Emulated, guarded: Guarded, config: np.ndarray, m: int
) -> None:
    emulated.config[:] = config
    codes, q = np.full((64, 64), 2, np.uint8), np.ones((m, 64), np.int8)
    assert (run_dot(guarded, emulated.dot, KERNELS[0], codes, q, 0) == 128).all()
    assert np.array_equal(emulated.config, config)
    emulated.config[:] = INIT
