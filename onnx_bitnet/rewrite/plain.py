"""Put a MatMul with float weights in the place of a layer: to simulate packed ops, and to restore them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_bitnet import reference
from onnx_bitnet.graphs import roots
from onnx_bitnet.quantization.floats import Floats
from onnx_bitnet.quantization.rotation import Rotation
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.functions import DOMAIN, HADAMARD
from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes
from onnx_bitnet.rewrite.records import Linear, constant_operand, operand
from onnx_bitnet.rewrite.replace import LAYER, Edit, Shared, declare

BASIS = f"{DOMAIN}.basis"
_AXES_INPUT_SINCE = 18  # opset
_FLOAT8_SINCE = 9  # IR version


@dataclass(frozen=True, eq=False)
class Plain:
    """A weight as it is stored for MatMul.

    Args:
        weight: float32 or float16 (K, N).
    """

    weight: np.ndarray

    @property
    def n(self) -> int:
        """Outputs."""
        return int(self.weight.shape[1])

    @property
    def k(self) -> int:
        """Inputs."""
        return int(self.weight.shape[0])

    @property
    def format(self) -> str:
        """What the report calls it."""
        return self.weight.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        return self.weight[:, rows].T.astype(np.float32)

    @classmethod
    def of(cls, weight: np.ndarray, linear: Linear) -> Plain:
        """Store a float32 weight (N, K): as float16 where x is and nothing is lost."""
        kinds = [weight, *([linear.bias.array()] if linear.bias else [])]
        half = linear.dtype == ir.DataType.FLOAT16 and all(_fits_float16(array) for array in kinds)
        return cls(np.ascontiguousarray(weight.T, np.float16 if half else np.float32))


def _fits_float16(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(np.float16), array)


def replace_plain(
    model: ir.Model,
    linear: Linear,
    plain: Plain | Floats,
    *,
    activation_bits: int,
    activation_scale: float = 0.0,
    rotation: Rotation | None = None,
    bias_shift: np.ndarray | None = None,
    shared: Shared,
) -> None:
    """Replace one layer by MatMul and Add, in float32 unless weight and activations are float16.

    Args:
        model: changed in place.
        linear: found by `scan` in this model, or made from one of `packed_nodes`.
        plain: its weight, for floats of 8 bits behind DequantizeLinear; the same object for layers that share
            it.
        activation_bits: 8 or 16 quantize and dequantize activations in standard ops, as packed ops do.
        activation_scale: step of statically quantized activations; 0 quantizes each row by its own peak.
        rotation: see replace.replace; the op for it is spelled in standard ops by `spell_out`.
        bias_shift: see replace.replace.
        shared: the same object for all replacements in a model.
    """
    declare(model, linear.root, "", opset_version(linear.root))
    edit = Edit(linear, shared)
    x, step = edit.enter(model, rotation), None
    half = activation_bits == 32 and plain.format == "float16" and bias_shift is None
    dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    x = x if half else edit.to_float32(x)
    if activation_bits != 32:
        x, step = _quantized(edit, x, activation_bits, activation_scale)
    weight = _dequantized(model, edit, plain) if isinstance(plain, Floats) else _stored(edit, plain, half)
    y = edit.main(ir.Node("", "MatMul", [x, weight]), dtype)
    y = y if step is None else edit.op("Mul", [y, step], dtype)
    bias: ir.Value | None = None
    if bias_shift is not None:
        bias = edit.shifted_bias(bias_shift)
    elif linear.bias is not None:
        bias = edit.bias(dtype)
    y = y if bias is None else edit.op("Add", [y, bias], dtype)
    edit.leave(y if half else edit.to_activations(y))


def _stored(edit: Edit, plain: Plain, half: bool) -> ir.Value:
    """The weight in the type that MatMul computes in."""
    weight = edit.tensor(plain.format, plain.weight, plain)
    return edit.to_float32(weight) if plain.format == "float16" and not half else weight


def _dequantized(model: ir.Model, edit: Edit, floats: Floats) -> ir.Value:
    """A weight (K, N) of small floats, made float32 by DequantizeLinear."""
    model.ir_version = max(model.ir_version, _FLOAT8_SINCE)
    scale, attributes = floats.scale.T, {}
    if floats.block_size:
        attributes = {"axis": 0, "block_size": floats.block_size}
    else:
        scale = scale.reshape(scale.size) if floats.scale.shape[0] > 1 else scale.reshape(())
        attributes = {"axis": 1} if scale.ndim else {}
    constants = [
        edit.tensor(floats.format, floats.values, floats),
        edit.tensor("scale", np.ascontiguousarray(scale).reshape(scale.shape), floats),
    ]
    return edit.op("DequantizeLinear", constants, ir.DataType.FLOAT, **attributes)


def _quantized(edit: Edit, x: ir.Value, bits: int, static: float) -> tuple[ir.Value, ir.Value]:
    """Return float32 x as integers -L - 1 to L, and the step between two of them."""

    def constant(value: float) -> ir.Value:
        return edit.constant(f"{DOMAIN}.float.{value:g}", np.array(value, np.float32))

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        return edit.op(op_type, inputs, ir.DataType.FLOAT)

    def clamped(factor: ir.Value) -> ir.Value:
        rounded = op("Round", op("Mul", x, factor))
        return op("Max", op("Min", rounded, most), constant(-(2.0 ** (bits - 1))))

    most = constant(2.0 ** (bits - 1) - 1)
    if static:
        step = edit.constant(f"{DOMAIN}.step.{static!r}", np.array(static, np.float32))
        return clamped(op("Div", constant(1.0), step)), step
    magnitudes = op("Abs", x)
    if opset_version(edit.linear.root) >= _AXES_INPUT_SINCE:
        last = edit.constant(f"{DOMAIN}.shape.-1", np.array([-1], np.int64))
        peak = edit.op("ReduceMax", [magnitudes, last], ir.DataType.FLOAT, keepdims=1)
    else:
        peak = edit.op("ReduceMax", [magnitudes], ir.DataType.FLOAT, axes=(-1,), keepdims=1)
    absmax = op("Max", peak, constant(1e-5))
    return clamped(op("Mul", op("Div", constant(1.0), absmax), most)), op("Div", absmax, most)


def leave_float(product: ir.Node) -> None:
    """Take the steps of `_quantized` and the scaling away from around a MatMul, in place, if it has them."""
    x = operand(product, 0)
    for op_type in ("Max", "Min", "Round", "Mul"):
        made_by = x.producer()
        if made_by is None or made_by.op_type != op_type:
            return
        x = operand(made_by, 0)
    y = product.outputs[0]
    readers = [usage.node for usage in y.uses()]
    if [reader.op_type for reader in readers] != ["Mul"]:
        return
    product.replace_input_with(0, x)
    scaled = readers[0].outputs
    kept = ir.Node("", "Identity", [y])
    assert product.graph is not None
    ir.convenience.replace_nodes_and_values(product.graph, readers[0], readers, [kept], scaled, kept.outputs)


def restore(model: ir.Model, activation_bits: int | None) -> Iterator[tuple[PackedNode, Plain, int]]:
    """Replace every packed op by a MatMul with the weight that it stands for; yield what was and what is.

    Activations of 16 bits become float, those of 8 bits and static ones stay quantized, unless other
    `activation_bits` are given; what was done is yielded, too. At the end the other ops of the project are
    spelled in standard ops, and its functions are gone.

    Raises:
        ModelError: a packed op is malformed, or holds bytes that stand for no codes.
    """
    shared = Shared.of(model)
    done: dict[tuple[ir.Value | None, ...], Plain] = {}
    for packed in list(packed_nodes(model)):
        linear = _linear(packed)
        key = tuple(packed.node.inputs[1:4])
        plain = done.get(key) or Plain.of(packed.dequantize(), linear)
        done[key] = plain
        step = packed.node.attributes.get_float("activation_scale", 0.0)
        bits = activation_bits or (packed.activation_bits if step or packed.activation_bits == 8 else 32)
        step = step if bits == packed.activation_bits else 0.0
        replace_plain(model, linear, plain, activation_bits=bits, activation_scale=step, shared=shared)
        yield packed, plain, bits
    spell_out(model)


def spell_out(model: ir.Model) -> None:
    """Spell the project's ops that are left in standard ops, and drop its functions and domain.

    What brings x into another basis is marked with `BASIS`.
    """
    InlinePass(criteria=lambda function: function.domain == DOMAIN and function.name != HADAMARD)(model)
    known = {node for root in roots(model) for node in root.all_nodes()}
    InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    for node in {node for root in roots(model) for node in root.all_nodes()} - known:
        node.metadata_props[BASIS] = HADAMARD
    for op in [op for op in model.functions if op[0] == DOMAIN]:
        del model.functions[op]
    for root in roots(model):
        root.opset_imports.pop(DOMAIN, None)


def _linear(packed: PackedNode) -> Linear:
    node = packed.node
    bias = operand(node, len(node.inputs) - 1)
    tensor = ir.convenience.get_const_tensor(bias)
    assert tensor is not None
    zeros = not tensor.numpy().any()
    x = operand(node, 0)
    if x.dtype is None:
        x.type = ir.TensorType(node.outputs[0].dtype or ir.DataType.FLOAT)
    return Linear(
        packed.layer,
        node,
        0,
        Constant(operand(node, 1), packed.tensors[0], (packed.n, packed.k)),
        packed.root,
        bias=None if zeros else Constant(bias, tensor, (packed.n,)),
    )


@dataclass(frozen=True)
class PlainNode:
    """A MatMul that replaced a layer, as it stands in a model."""

    layer: str
    node: ir.Node

    def decoder(self) -> Callable[[slice], np.ndarray]:
        """Return what gives rows of its weight as float32 (rows, K)."""
        made_by = operand(self.node, 1).producer()
        if made_by is not None and made_by.op_type == "DequantizeLinear":
            values, scale = (constant_operand(made_by, index) for index in (0, 1))
            size = made_by.attributes.get_int("block_size", 0)
            return lambda rows: reference.dequantize_linear(values, scale, size, rows)
        if made_by is not None and made_by.op_type == "Cast":
            weight = constant_operand(made_by, 0)
        else:
            weight = constant_operand(self.node, 1)
        return lambda rows: weight[:, rows].T.astype(np.float32)


def plain_nodes(model: ir.Model) -> Iterator[PlainNode]:
    """Yield every MatMul that replaced a layer."""
    for graph in roots(model):
        for node in graph.all_nodes():
            if node.op_type == "MatMul" and LAYER in node.metadata_props:
                yield PlainNode(node.metadata_props[LAYER], node)
