"""A linear layer in llama.cpp's ggml, through ctypes and the library in the wheel `xllamacpp`.

Weights that ggml can repack for this CPU are also timed repacked. Its AMX buffers are left out: they and
onnxruntime's int8 kernel, in one process, overwrite each other's tile configuration.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np
from peers import SCALE, Layer

TYPES = {"TQ2_0": 35, "TQ1_0": 34, "Q2_K": 10, "Q4_0": 2, "Q8_0": 8}  # of enum ggml_type
FLOAT, ALIGN = 0, 4096

Pointer, Size, Long, Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class Parameters(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


SIGNATURES = {
    "ggml_log_set": (None, [Pointer, Pointer]),
    "ggml_init": (Pointer, [Parameters]),
    "ggml_free": (None, [Pointer]),
    "ggml_new_tensor_2d": (Pointer, [Pointer, Int, Long, Long]),
    "ggml_mul_mat": (Pointer, [Pointer, Pointer, Pointer]),
    "ggml_new_graph_custom": (Pointer, [Pointer, Size, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_row_size": (Size, [Int, Long]),
    "ggml_blck_size": (Long, [Int]),
    "ggml_quantize_chunk": (Size, [Int, Pointer, Pointer, Long, Long, Long, Pointer]),
    "ggml_backend_cpu_init": (Pointer, []),
    "ggml_backend_free": (None, [Pointer]),
    "ggml_backend_cpu_set_n_threads": (None, [Pointer, Int]),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, Size]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [Pointer, Pointer]),
    "ggml_backend_cpu_buffer_type": (Pointer, []),
    "ggml_backend_buft_name": (ctypes.c_char_p, [Pointer]),
    "ggml_backend_buft_alloc_buffer": (Pointer, [Pointer, Size]),
    "ggml_backend_buft_get_alloc_size": (Size, [Pointer, Pointer]),
    "ggml_backend_buffer_get_base": (Pointer, [Pointer]),
    "ggml_backend_buffer_set_usage": (None, [Pointer, Int]),
    "ggml_backend_buffer_free": (None, [Pointer]),
    "ggml_backend_tensor_alloc": (Int, [Pointer, Pointer, Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_graph_compute": (Int, [Pointer, Pointer]),
}


_SILENT = ctypes.CFUNCTYPE(None, Int, ctypes.c_char_p, Pointer)(lambda *_: None)


def load() -> ctypes.CDLL | None:
    """Return ggml, or None if the wheel is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    libraries = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not libraries:
        return None
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # its idle threads sleep after about 1 ms
    ggml = ctypes.CDLL(str(libraries[0]))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    ggml.ggml_log_set(ctypes.cast(_SILENT, Pointer), None)
    return ggml


def buffer_types(ggml: ctypes.CDLL) -> dict[str, int]:
    """Return ggml's kinds of memory for weights by the suffix they get here: plain, and repacking."""
    found = {"": ggml.ggml_backend_cpu_buffer_type()}
    registry = ggml.ggml_backend_cpu_reg()
    function = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if function:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(function)
        listed = extra(ggml.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while listed and listed[index]:
            if ggml.ggml_backend_buft_name(listed[index]) == b"CPU_REPACK":
                found[" repacked"] = listed[index]
            index += 1
    return found


class GgmlLayers:
    """Copies of a layer in one ggml graph; all of them write to the same memory.

    Raises:
        ValueError: ggml cannot multiply such a layer in this kind of memory.
    """

    def __init__(
        self, ggml: ctypes.CDLL, kind: int, memory: int, layer: Layer, copies: int, threads: int
    ) -> None:
        self._ggml, self._layer, self.copies = ggml, layer, copies
        if layer.k % ggml.ggml_blck_size(kind):
            raise ValueError("K does not fit the blocks")
        self._context = ggml.ggml_init(Parameters((copies + 8) * 512, None, True))
        self._weights = [
            ggml.ggml_new_tensor_2d(self._context, kind, layer.k, layer.n) for _ in range(copies)
        ]
        step = -(-ggml.ggml_backend_buft_get_alloc_size(memory, self._weights[0]) // 64) * 64
        self._buffer = ggml.ggml_backend_buft_alloc_buffer(memory, step * copies + ALIGN)
        ggml.ggml_backend_buffer_set_usage(self._buffer, 1)  # weights
        base = self._aligned(self._buffer)
        for index, weight in enumerate(self._weights):
            ggml.ggml_backend_tensor_alloc(self._buffer, weight, base + index * step)
        self._call: tuple[int, int] | None = None
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        if memory != ggml.ggml_backend_cpu_buffer_type() and not self._supported():
            self.close()
            raise ValueError("this type is not repacked")
        self._fill(kind)

    def _aligned(self, buffer: int) -> int:
        return -(-self._ggml.ggml_backend_buffer_get_base(buffer) // ALIGN) * ALIGN

    def _supported(self) -> bool:
        ggml = self._ggml
        context = ggml.ggml_init(Parameters(1 << 16, None, True))
        x = ggml.ggml_new_tensor_2d(context, FLOAT, self._layer.k, 8)
        product = ggml.ggml_mul_mat(context, self._weights[0], x)
        device = ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0)
        supported = ggml.ggml_backend_dev_supports_op(device, product)
        ggml.ggml_free(context)
        return supported

    def _fill(self, kind: int) -> None:
        n, k = self._layer.n, self._layer.k
        weight = self._layer.ternary * SCALE
        rows = np.zeros((n, self._ggml.ggml_row_size(kind, k)), np.uint8)
        self._ggml.ggml_quantize_chunk(kind, weight.ctypes.data, rows.ctypes.data, 0, n, k, None)
        self.nbytes = rows.nbytes
        for index, tensor in enumerate(self._weights):
            rotated = np.roll(rows, 7 * index, axis=0)
            self._ggml.ggml_backend_tensor_set(tensor, rotated.ctypes.data, 0, rotated.nbytes)

    def prepare(self, m: int, copies: int | None = None) -> None:
        """Build the graph for m rows."""
        self._drop_call()
        ggml, layer = self._ggml, self._layer
        size = self.copies + 16
        context = ggml.ggml_init(Parameters(size * 2048 + (1 << 16), None, True))
        x = ggml.ggml_new_tensor_2d(context, FLOAT, layer.k, m)
        ys = [ggml.ggml_mul_mat(context, weight, x) for weight in self._weights[:copies]]
        rows = layer.rows(m)
        x_bytes = -(-rows.nbytes // ALIGN) * ALIGN
        y_bytes = 4 * m * layer.n
        buffer = ggml.ggml_backend_buft_alloc_buffer(
            ggml.ggml_backend_cpu_buffer_type(), x_bytes + y_bytes + 2 * ALIGN
        )
        base = self._aligned(buffer)
        ggml.ggml_backend_tensor_alloc(buffer, x, base)
        for y in ys:
            ggml.ggml_backend_tensor_alloc(buffer, y, base + x_bytes)
        ggml.ggml_backend_tensor_set(x, rows.ctypes.data, 0, rows.nbytes)
        self._graph = ggml.ggml_new_graph_custom(context, size, False)
        for y in ys:
            ggml.ggml_build_forward_expand(self._graph, y)
        self._call, self._y = (context, buffer), ys[0]

    def run(self) -> None:
        """Multiply once."""
        if self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml fails")

    def first(self, m: int) -> np.ndarray:
        """Return the result of the first copy."""
        self.prepare(m, copies=1)
        self.run()
        y = np.zeros((m, self._layer.n), np.float32)
        self._ggml.ggml_backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        self.prepare(m)
        return y

    def close(self) -> None:
        """Give all memory back to ggml."""
        self._drop_call()
        self._ggml.ggml_backend_free(self._backend)
        self._ggml.ggml_backend_buffer_free(self._buffer)
        self._ggml.ggml_free(self._context)

    def _drop_call(self) -> None:
        if self._call:
            context, buffer = self._call
            self._ggml.ggml_free(context)
            self._ggml.ggml_backend_buffer_free(buffer)
            self._call = None
