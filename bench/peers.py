"""One linear layer with ternary weights, spelled in every way in which onnxruntime can run it.

`write` makes a model of many copies of the layer side by side, each with weights of its own: its time by the
number of copies is what one layer takes when its weights come from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from timing import open_session

from onnx_bitnet import reference
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.nbits import pack

SCALE = np.float32(0.0437)
PAGE = 4096


@dataclass(frozen=True)
class Layer:
    """A ternary weight of shape (n, k) with one scale, and rows to multiply it with."""

    n: int
    k: int

    @property
    def ternary(self) -> np.ndarray:
        """Return -1, 0, 1; the same ones each time."""
        return np.random.default_rng([self.n, self.k]).integers(-1, 2, (self.n, self.k), np.int8)

    def rows(self, m: int) -> np.ndarray:
        """Return m rows of activations."""
        return np.random.default_rng(m).standard_normal((m, self.k), np.float32)

    def expected(self, m: int) -> np.ndarray:
        """Return what the layer makes of `rows(m)`, in fp32."""
        return self.rows(m) @ (self.ternary.T * SCALE)


@dataclass(frozen=True)
class Spelling:
    """A layer as one node.

    Args:
        op_type: the node's op.
        domain: its domain.
        tensors: its constant inputs in order; `weight` is the first.
        axis: axis of the weight along which the outputs lie.
        attributes: of the node.
    """

    op_type: str
    domain: str
    tensors: dict[str, np.ndarray]
    axis: int
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the constants."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def fp32(layer: Layer) -> Spelling:
    return Spelling("MatMul", "", {"weight": np.ascontiguousarray(layer.ternary.T * SCALE)}, axis=1)


def int8(layer: Layer) -> Spelling:
    tensors = {
        "weight": np.ascontiguousarray(layer.ternary.T),
        "scale": np.float32([SCALE]),
        "zero_point": np.zeros(1, np.int8),
    }
    return Spelling("DynamicQuantizeMatMul", "com.microsoft", tensors, axis=1)


def nbits(bits: int, block: int) -> Callable[[Layer], Spelling]:
    """Return a spelling as MatMulNBits with int8 activations (accuracy_level 4)."""

    def spell(layer: Layer) -> Spelling:
        n, k = layer.n, layer.k
        tensors = {"weight": pack(layer.ternary, bits, block), "scale": np.full((n, k // block), SCALE)}
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
        return Spelling("MatMulNBits", "com.microsoft", tensors, axis=0, attributes=attributes)

    return spell


def ours(activation_bits: int, block: int = 0, form: str = "i2s") -> Callable[[Layer], Spelling]:
    def spell(layer: Layer) -> Spelling:
        n, k = layer.n, layer.k
        tensors = {
            "weight": reference.PACK[form](layer.ternary + 1)[None],
            "scale": np.full((1, n, -(-k // block)) if block else (1, 1, 1), SCALE),
            "zero_point": np.ones((1, 1, 1), np.float32),
            "bias": np.zeros(n, np.float32),
        }
        if form != "i2s":
            del tensors["zero_point"]
        attributes = {"K": k, "N": n, "block_size": block, "activation_bits": activation_bits}
        attributes["activation_scale"] = 0.0
        return Spelling(FORMATS[form].op_type, "onnx_bitnet", tensors, axis=1, attributes=attributes)

    return spell


def ours_integer(bits: int, activation_bits: int) -> Callable[[Layer], Spelling]:
    """Return a spelling as a weight of 4 or 8 bits: planes of base-4 digits."""

    def spell(layer: Layer) -> Spelling:
        codes = layer.ternary.astype(np.int16) + (1 << (bits - 1))
        powers = [4**place for place in reversed(range(bits // 2))]
        planes = np.stack([codes // power % 4 for power in powers])
        zero_point = np.zeros((len(powers), 1, 1), np.float32)
        zero_point[0] = 2
        tensors = {
            "weight": reference.pack_i2s(planes),
            "scale": np.float32(powers)[:, None, None] * SCALE,
            "zero_point": zero_point,
            "bias": np.zeros(layer.n, np.float32),
        }
        attributes = {"K": layer.k, "N": layer.n, "block_size": 0, "activation_bits": activation_bits}
        attributes["activation_scale"] = 0.0
        return Spelling("MatMulI2S", "onnx_bitnet", tensors, axis=1, attributes=attributes)

    return spell


OURS = {
    "ours A8": ours(8),
    "ours A16": ours(16),
    "ours t5 A8": ours(8, form="t5"),
    "ours A8 block:128": ours(8, 128),
    "ours A16 block:128": ours(16, 128),
    "ours int4 A8": ours_integer(4, 8),
    "ours int4 A16": ours_integer(4, 16),
    "ours int8 A8": ours_integer(8, 8),
    "ours int8 A16": ours_integer(8, 16),
}
ORT = {
    "ORT fp32": fp32,
    "ORT int8": int8,
    **{
        f"ORT {bits}-bit/{block}": nbits(bits, block)
        for bits, block in ((2, 32), (2, 128), (4, 32), (4, 128))
    },
    "ORT 8-bit/128": nbits(8, 128),
}


def write(spelling: Spelling, layer: Layer, copies: int, folder: Path) -> Path:
    """Write a model with `copies` of the layer, each with other weights: the rows of the first, rotated."""
    initializers, offset = [], 0
    constants = {name: tensor for name, tensor in spelling.tensors.items() if name != "weight"}
    initializers += [numpy_helper.from_array(tensor, name) for name, tensor in constants.items()]
    with (folder / "weights").open("wb") as file:
        for copy in range(copies):
            weight = np.roll(spelling.tensors["weight"], 7 * copy, axis=spelling.axis)
            tensor = TensorProto(name=f"weight{copy}", dims=weight.shape)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(weight.dtype)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights", "offset": str(offset), "length": str(weight.nbytes)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            initializers.append(tensor)
            file.write(weight.tobytes() + bytes(-weight.nbytes % PAGE))
            offset = file.tell()
    nodes = [
        helper.make_node(
            spelling.op_type,
            ["x", f"weight{copy}", *constants],
            [f"y{copy}"],
            domain=spelling.domain,
            **spelling.attributes,
        )
        for copy in range(copies)
    ]
    outputs = [
        helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["m", layer.n]) for copy in range(copies)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", layer.k])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 18), ("com.microsoft", 1))]
    opsets.append(helper.make_opsetid("onnx_bitnet", 1))
    graph = helper.make_graph(nodes, "layers", [x], outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "layers.onnx")
    return folder / "layers.onnx"


class OrtLayers:
    """Copies of a layer in a session; all of them write to the same memory."""

    def __init__(self, spelling: Spelling, layer: Layer, copies: int, threads: int, folder: Path) -> None:
        self._layer = layer
        self._session = open_session(write(spelling, layer, copies, folder), threads)
        self._binding = self._session.io_binding()
        self._y: ort.OrtValue | None = None
        self.copies = copies

    def prepare(self, m: int) -> None:
        """Bind m rows and memory for the results."""
        x = ort.OrtValue.ortvalue_from_numpy(self._layer.rows(m))
        self._y = ort.OrtValue.ortvalue_from_numpy(np.zeros((m, self._layer.n), np.float32))
        self._binding.bind_ortvalue_input("x", x)
        for copy in range(self.copies):
            self._binding.bind_ortvalue_output(f"y{copy}", self._y)

    def run(self) -> None:
        """Multiply once with each copy."""
        self._session.run_with_iobinding(self._binding)

    def first(self, m: int) -> np.ndarray:
        """Return the result of the first copy."""
        return self._session.run(["y0"], {"x": self._layer.rows(m)})[0]
