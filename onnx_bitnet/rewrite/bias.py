"""Add of a constant after a linear layer: its bias."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Linear, Site, operand, rank


def absorb_add(linear: Linear, site: Site) -> Linear:
    """Return the layer with the Add that follows it as its bias, or as it is.

    The constant may be on either side. It must be one number per output, and nothing else may read what is
    between the layer and the Add.
    """
    if linear.bias is not None or linear.after or linear.addend_index is not None:
        return linear
    add = only_reader(linear.y)
    if add is None or add.op_type != "Add" or add.graph is not site.node.graph:
        return linear
    other = _expanded(operand(add, 1 if operand(add, 0) is linear.y else 0), linear, add)
    if other not in site.facts.known:
        return linear
    constant = site.constant(other)
    if not isinstance(constant, Constant) or not keeps_shape(constant, linear):
        return linear
    return replace(linear, absorbed=(*linear.absorbed, add), bias=constant)


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node of two operands and one output that alone reads a value."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    whole = len(use.node.inputs) == 2 and None not in use.node.inputs and len(use.node.outputs) == 1
    return use.node if whole and not use.node.domain else None


def _expanded(value: ir.Value, linear: Linear, add: ir.Node) -> ir.Value:
    """Look through the Expand of a bias to the shape of y, as BitLinear of transformers does it."""
    node = value.producer()
    if node is None or node.domain or node.op_type != "Expand":
        return value
    y, total = linear.y.shape, add.outputs[0].shape
    same = y is not None and total is not None and y == total and not y.has_unknown_dim()
    return operand(node, 0) if same else value


def keeps_shape(constant: Constant, linear: Linear) -> bool:
    """Whether a constant has one number for each output, and adding it leaves the shape of the product."""
    *lead, last = constant.shape or (1,)
    y_rank = len(linear.before[-1].value) if linear.before else rank(linear.x) or 1  # at least
    return last in (1, linear.weight.n) and all(dim == 1 for dim in lead) and len(constant.shape) <= y_rank
