"""The straight-through estimator: x + (q - x), which training code writes so that gradients go around q."""

from __future__ import annotations

import onnx_ir as ir


def straight_through(value: ir.Value) -> ir.Value | None:
    """Return q if the value is computed as x + (q - x), else None.

    What the graph computes is q up to rounding, which is what its author means.
    """
    node = value.producer()
    if node is None or node.domain or node.op_type != "Add" or len(node.inputs) != 2:
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        difference = None if other is None else other.producer()
        if difference is None or difference.domain or difference.op_type != "Sub":
            continue
        if len(difference.inputs) != 2:
            continue
        q, subtracted = difference.inputs
        if subtracted is x and q is not None and _same_shape(q, value):
            return q
    return None


def _same_shape(q: ir.Value, value: ir.Value) -> bool:
    """Whether nothing in the model says that q was broadcast."""
    return q.shape is None or value.shape is None or q.shape == value.shape
