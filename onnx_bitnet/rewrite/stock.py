"""Put ops that every onnxruntime has in the place of a linear layer, with the same few-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet import reference
from onnx_bitnet.graphs import roots
from onnx_bitnet.quantization.nbits import DynamicInt8, NBits
from onnx_bitnet.quantization.rotation import Rotation
from onnx_bitnet.rewrite.records import Linear, constant_operand
from onnx_bitnet.rewrite.replace import LAYER, Edit, Shared, declare

_DOMAIN = "com.microsoft"
_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS = 4, 1  # accuracy_level


def replace_stock(
    model: ir.Model,
    linear: Linear,
    packed: NBits | DynamicInt8,
    *,
    activation_bits: int,
    rotation: Rotation | None = None,
    bias_shift: np.ndarray | None = None,
    shared: Shared,
) -> None:
    """Replace one layer by MatMulNBits or DynamicQuantizeMatMul; float16 activations go through float32.

    MatMulNBits quantizes activations to 8 bits by block, or leaves them float.

    Args:
        model: changed in place.
        linear: found by `scan` in this model.
        packed: its weight.
        activation_bits: 8 or 32.
        rotation: see replace.replace; the op for it is spelled in standard ops by `plain.spell_out`.
        bias_shift: see replace.replace.
        shared: the same object for all replacements in a model.
    """
    declare(model, linear.root, _DOMAIN)
    edit = Edit(linear, shared)
    x = edit.to_float32(edit.enter(model, rotation))
    constants = [
        edit.tensor(packed.format, packed.weight, packed),
        edit.tensor("scale", packed.scale, packed),
    ]
    bias: ir.Value | None = None
    if bias_shift is not None:
        bias = edit.shifted_bias(bias_shift)
    elif linear.bias is not None:
        bias = edit.bias()
    if isinstance(packed, NBits):
        attributes = {
            "K": packed.k,
            "N": packed.n,
            "bits": packed.bits,
            "block_size": packed.block_size,
            "accuracy_level": _INT8_ACTIVATIONS if activation_bits == 8 else _FLOAT_ACTIVATIONS,
        }
        rest = [None, None, bias] if bias else []  # neither zero points nor an order of the inputs
        node = ir.Node(
            _DOMAIN, "MatMulNBits", [x, *constants, *rest], ir.convenience.convert_attributes(attributes)
        )
    else:
        node = ir.Node(_DOMAIN, "DynamicQuantizeMatMul", [x, *constants, *([None, bias] if bias else [])])
    edit.leave(edit.to_activations(edit.main(node, ir.DataType.FLOAT)))


@dataclass(frozen=True)
class StockNode:
    """An op of onnxruntime that replaced a layer, as it stands in a model.

    Args:
        layer: name of the layer it replaced.
        node: the node itself.
    """

    layer: str
    node: ir.Node

    def decoder(self) -> Callable[[slice], np.ndarray]:
        """Return what decodes rows of its weight to float32 (rows, K), by the NumPy reference."""
        weight, scale = (constant_operand(self.node, index) for index in (1, 2))
        if self.node.op_type == "DynamicQuantizeMatMul":
            by_row = np.broadcast_to(scale, weight.shape[1])[:, None]
            return lambda rows: weight.T[rows] * by_row[rows]
        bits, k = (self.node.attributes[name].as_int() for name in ("bits", "K"))
        return lambda rows: reference.dequantize_nbits(weight[rows], scale[rows], bits, k)


def leave_float(node: ir.Node) -> None:
    """Let an op of onnxruntime leave its activations float, in place; its weight stays what it is.

    Weights of 8 bits, for which onnxruntime before 1.23 has no float product, are decoded in standard ops.
    Nodes with zero points, which no conversion writes, stay.
    """
    given = node.attributes
    if given.get_int("accuracy_level", 0) == _FLOAT_ACTIVATIONS:
        return
    if given.get_int("bits", 8) < 8:
        given["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT_ACTIVATIONS)
    elif len(node.inputs) == 3 or node.inputs[3] is None:
        _spell_out(node)


def _spell_out(node: ir.Node) -> None:
    """Put the product of x with the decoded weight in the place of an op with a weight of 8 bits."""
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value | None, **attributes: int | Sequence[int]) -> ir.Value:
        return add(ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes)))

    def constant(array: np.ndarray) -> ir.Value:
        return add(ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))]))

    def add(made: ir.Node) -> ir.Value:
        made.outputs[0].name = f"{node.outputs[0].name}.{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    x, weight, scale = node.inputs[:3]
    decoded = op("Cast", weight, to=int(ir.DataType.FLOAT))
    if node.op_type == "MatMulNBits":
        (n, blocks, _), k = constant_operand(node, 1).shape, node.attributes["K"].as_int()
        decoded = op("Sub", decoded, constant(np.array(1 << 7, np.float32)))
        decoded = op("Mul", decoded, op("Reshape", scale, constant(np.array([n, blocks, 1], np.int64))))
        decoded = op("Reshape", decoded, constant(np.array([n, -1], np.int64)))
        unpadded = op("Gather", decoded, constant(np.arange(k, dtype=np.int64)), axis=1)
        decoded = op("Transpose", unpadded, perm=(1, 0))
    else:
        decoded = op("Mul", decoded, scale)
    y = op("MatMul", x, decoded)
    if len(node.inputs) > 3:
        y = op("Add", y, node.inputs[-1])
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, [y])


def stock_nodes(model: ir.Model) -> Iterator[StockNode]:
    """Yield every op of onnxruntime that replaced a layer."""
    for graph in roots(model):
        for node in graph.all_nodes():
            if node.domain == _DOMAIN and LAYER in node.metadata_props:
                yield StockNode(node.metadata_props[LAYER], node)
