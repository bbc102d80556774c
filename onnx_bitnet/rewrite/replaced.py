"""Find what stands in the place of linear layers in a model, whatever the target was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import onnx_ir as ir

from onnx_bitnet.graphs import roots
from onnx_bitnet.rewrite import packed, plain, stock
from onnx_bitnet.rewrite.functions import DOMAIN
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes
from onnx_bitnet.rewrite.plain import BASIS, PlainNode, plain_nodes
from onnx_bitnet.rewrite.stock import StockNode, stock_nodes

Replaced = PackedNode | StockNode | PlainNode

# Of the ops that layers become, those that round what is no constant.
_ROUNDING = frozenset({"DynamicQuantizeMatMul", "Round"})


def replaced(model: ir.Model) -> Iterator[Replaced]:
    """Yield every node that replaced a layer.

    Raises:
        ModelError: a packed op is malformed.
    """
    return chain(packed_nodes(model), stock_nodes(model), plain_nodes(model))


def made_by_conversion(model: ir.Model) -> set[str]:
    """Return the names of replaced layers, and of nodes that bring x into another basis in standard ops."""
    turning = {
        str(node.name) for graph in roots(model) for node in graph.all_nodes() if BASIS in node.metadata_props
    }
    return turning | {found.layer for found in replaced(model)}


def leave_float(graph: ir.Graph) -> None:
    """Let layers leave their activations float, in place: `rounds` tells where that could not be done.

    Args:
        graph: made of the nodes of such layers alone.
    """
    for node in list(graph):
        if node.domain == DOMAIN and "activation_bits" in node.attributes:
            packed.leave_float(node)
        elif node.op_type in ("MatMulNBits", "DynamicQuantizeMatMul"):
            stock.leave_float(node)
        elif node.op_type == "MatMul":
            plain.leave_float(node)


def rounds(y: ir.Value) -> bool:
    """Whether one of the ops that make a value rounds activations; packed ops are not looked at."""
    seen: set[ir.Node] = set()
    todo = [y]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in seen:
            seen.add(node)
            todo += filter(None, node.inputs)
    return any(node.op_type in _ROUNDING for node in seen)
