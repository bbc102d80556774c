"""Random packed layers as ONNX models, with what they must compute; shared by the tests of op and body."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from onnx_bitnet import reference
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.rewrite import functions

Shape = Sequence[int | str | None]


@dataclass(frozen=True)
class Layer:
    """One packed layer: the attributes and constant inputs of its node."""

    n: int
    k: int
    block_size: int
    activation_bits: int
    activation_scale: float
    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bias: np.ndarray
    form: str = "i2s"

    @property
    def op_type(self) -> str:
        return FORMATS[self.form].op_type

    @property
    def constants(self) -> list[str]:
        """Names of the constant inputs, in order."""
        zero_point = ["zero_point"] if FORMATS[self.form].four_levels else []
        return ["weight", "scale", *zero_point, "bias"]

    def to(self, form: str) -> Layer:
        """Return the same layer in another format: of the oracle's bytes."""
        codes = reference.UNPACK[self.form](self.weight, self.k)
        return dataclasses.replace(self, form=form, weight=reference.PACK[form](codes))

    def expected(self, x: np.ndarray) -> np.ndarray:
        return reference.matmul(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            k=self.k,
            block_size=self.block_size,
            activation_bits=self.activation_bits,
            activation_scale=self.activation_scale,
            form=self.form,
        )

    def node(self, x: str = "x", y: str = "y", name: str = "layer") -> onnx.NodeProto:
        return helper.make_node(
            self.op_type,
            [x, *self.constants],
            [y],
            name=name,
            domain=functions.DOMAIN,
            K=self.k,
            N=self.n,
            block_size=self.block_size,
            activation_bits=self.activation_bits,
            activation_scale=self.activation_scale,
        )

    def initializers(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(getattr(self, name), name) for name in self.constants]

    def model(
        self,
        dtype: type = np.float32,
        *,
        rank: int = 2,
        opset: int = 17,
        x_shape: Shape | None = None,
        with_function: bool = True,
    ) -> onnx.ModelProto:
        """Make x -> layer -> y; all dimensions of x but the last have names, unless x_shape says else."""
        batch = [f"d{axis}" for axis in range(rank - 1)]
        return model(
            [self.node()],
            self.initializers(),
            [value("x", dtype, [*batch, self.k] if x_shape is None else x_shape)],
            [value("y", dtype, None if x_shape is not None else [*batch, self.n])],
            opset=opset,
            with_function=with_function,
        )


def random_layer(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    planes: int = 1,
    block_size: int = 0,
    bits: int = 8,
    activation_scale: float = 0.0,
    shared_rows: bool = False,
    shared_groups: bool = False,
    ternary: bool = False,
    scale_type: type = np.float32,
) -> Layer:
    """Make a layer whose every code occurs; scales of both signs; zero points 1 or (not ternary) others."""
    groups = -(-k // block_size) if block_size else 1
    shape = (planes, 1 if shared_rows else n, 1 if shared_groups else groups)
    sign = rng.choice([-1, 1], shape)
    return Layer(
        n=n,
        k=k,
        block_size=block_size,
        activation_bits=bits,
        activation_scale=activation_scale,
        weight=reference.pack_i2s(rng.integers(0, 3 if ternary else 4, (planes, n, k))),
        scale=(sign * rng.uniform(0.01, 0.05, shape)).astype(scale_type),
        zero_point=np.ones((planes, 1, 1), scale_type)
        if ternary
        else rng.choice([0, 1, 1.5, 2.25], shape).astype(scale_type),
        bias=rng.standard_normal(n).astype(np.float32),
    )


def random_case(seed: int, bits: int, form: str = "i2s") -> Layer:
    """Make a layer with everything drawn: planes, blocks, ragged sizes, zero points, static activations."""
    rng = np.random.default_rng(seed)
    return random_layer(
        rng,
        int(rng.choice([1, 15, 16, 17, 63, 64, 65, 130])),
        int(rng.choice([1, 3, 4, 15, 16, 17, 33, 128, 200, 257])),
        planes=int(rng.integers(1, 5)),
        block_size=int(rng.choice([0, 0, 16, 32, 33, 300])),
        bits=bits,
        activation_scale=float(rng.choice([0.0, 0.0, 0.02])),
        shared_rows=bool(rng.integers(2)),
        shared_groups=seed % 5 == 0,
        ternary=bool(rng.integers(2)) or not FORMATS[form].four_levels,
        scale_type=np.float16 if rng.integers(2) else np.float32,
    ).to(form)


# Format, K, a row of bytes that no codes give, and what is said of it.
INVALID = {
    "i2s a pad of 0": ("i2s", 3, "00", "a code past K"),
    "tl1 low index 9": ("tl1", 4, "49", "a pair index is above 8"),
    "tl1 high index 15": ("tl1", 4, "f4", "a pair index is above 8"),
    "tl1 a pad pair of 0": ("tl1", 2, "04", "a code past K"),
    "tl1 half a pad pair": ("tl1", 3, "54", "a code past K"),
    "tl2 magnitude 14": ("tl2", 6, "e100", "a magnitude is above 13"),
    "tl2 magnitude -15": ("tl2", 6, "1f01", "a magnitude is above 13"),
    "tl2 minus 0": ("tl2", 6, "0102", "a magnitude of 0 has a sign"),
    "tl2 a sign past the last": ("tl2", 3, "0102", "a magnitude of 0 has a sign"),
    "tl2 a magnitude past the last": ("tl2", 3, "1100", "a code past K"),
    "tl2 a pad in a triple": ("tl2", 2, "0100", "a code past K"),
    "tl2 the 25th input": ("tl2", 25, "0000000001" + "0000", "a code past K"),
    "t5 byte 243": ("t5", 5, "f3", "a byte is above 242"),
    "t5 byte 255": ("t5", 5, "ff", "a byte is above 242"),
    "t5 a pad of 0": ("t5", 4, "00", "a code past K"),
}


def value(name: str, dtype: Any, shape: Shape | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    *,
    opset: int = 17,
    with_function: bool = True,
) -> onnx.ModelProto:
    ops = {node.op_type for node in nodes} & functions.FUNCTIONS.keys() or {"MatMulI2S"}
    body = [ir.to_proto(functions.FUNCTIONS[op](opset)) for op in sorted(ops)] if with_function else []
    return helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, 1)],
        functions=body,
        ir_version=10,  # the newest that onnxruntime 1.20 reads
    )


def rows(seed: int, shape: Sequence[int], dtype: type = np.float32) -> np.ndarray:
    """Activations of mixed magnitude: each row has its own scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * scale).astype(dtype)
