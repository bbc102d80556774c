"""Put ops that every onnxruntime has in the place of a linear layer, with the same few-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    bias = None if linear.bias is None else edit.bias()
    bias = bias if bias_shift is None else edit.shifted_bias(bias_shift)
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


def stock_nodes(model: ir.Model) -> Iterator[StockNode]:
    """Yield every op of onnxruntime that replaced a layer."""
    for graph in roots(model):
        for node in graph.all_nodes():
            if node.domain == _DOMAIN and LAYER in node.metadata_props:
                yield StockNode(node.metadata_props[LAYER], node)
