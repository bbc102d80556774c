"""What follows a linear layer and is linear, too: factors and a bias, which go into weight and bias."""

from __future__ import annotations

from dataclasses import replace

from onnx_bitnet.rewrite.bias import absorb_add, keeps_shape, only_reader
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.factors import factor
from onnx_bitnet.rewrite.records import Linear, Site, operand


def absorb(linear: Linear, site: Site) -> Linear:
    """Return the layer with the constant factors and the constant addend that follow it taken up."""
    while True:
        more = absorb_factor(absorb_add(linear, site), site)
        if more is linear:
            return linear
        linear = more


def absorb_factor(linear: Linear, site: Site) -> Linear:
    """Return the layer with the Mul or Div by a constant that follows it in its weight, or as it is.

    The constant is one number or one for each output; a bias before it is multiplied, too, by one number.
    """
    if linear.after or linear.addend_index is not None:
        return linear
    node = only_reader(linear.y)
    if node is None or node.op_type not in ("Mul", "Div") or node.graph is not linear.node.graph:
        return linear
    index = 1 if operand(node, 0) is linear.y else 0
    value = operand(node, index)
    if value not in site.facts.known or (node.op_type == "Div" and index == 0):
        return linear
    constant, found = site.constant(value), factor(value, site)
    if found is None or not isinstance(constant, Constant) or not keeps_shape(constant, linear):
        return linear
    by = found if node.op_type == "Mul" else found.inverse
    if by.coefficient.ndim and (by.coefficient.size != linear.weight.n or linear.bias is not None):
        return linear
    values = by.coefficient.tolist()
    scale = tuple(values) if isinstance(values, list) else values
    bias = linear.bias and linear.bias.scale(scale)
    return replace(linear, absorbed=(*linear.absorbed, node), weight=linear.weight.scale(scale), bias=bias)
