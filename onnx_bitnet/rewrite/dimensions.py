"""Shapes that a graph computes: which dimension of which value each of their entries is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Site, operand, rank

_DEEPEST = 8
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True, eq=False)
class Dimension:
    """How long a value is along an axis."""

    value: ir.Value
    axis: int

    def equals(self, entry: int | Dimension) -> bool:
        """Whether an entry of a shape is this dimension, as far as the model tells."""
        if isinstance(entry, Dimension):
            return entry.value is self.value and entry.axis == self.axis
        known = None if self.value.shape is None else self.value.shape[self.axis]
        return isinstance(known, int) and known == entry


def entries(shape: ir.Value, site: Site, depth: int = _DEEPEST) -> list[int | Dimension] | None:
    """Return what the entries of a shape are, or None if one of them is anything else.

    Read are constants, what Shape gives of values whose rank is known, parts of that, and their Concat.
    """
    numbers = _integers(shape, site)
    node = shape.producer()
    if numbers is not None or node is None or node.domain or depth == 0 or None in node.inputs:
        return None if numbers is None else [*numbers]
    if node.op_type == "Shape":
        return _dimensions(node)
    if node.op_type == "Concat":
        parts = [entries(operand(node, index), site, depth - 1) for index in range(len(node.inputs))]
        return None if None in parts else [entry for part in parts for entry in part or ()]
    whole = entries(operand(node, 0), site, depth - 1) if node.inputs else None
    if whole is None or _is_transparent(node, whole):
        return whole
    chosen = [_integers(operand(node, index), site) for index in range(1, len(node.inputs))]
    if node.op_type == "Gather" and chosen[0] is not None and node.attributes.get_int("axis", 0) == 0:
        return (
            [whole[index] for index in chosen[0]]
            if all(-len(whole) <= i < len(whole) for i in chosen[0])
            else None
        )
    if node.op_type == "Slice":
        return _part(whole, chosen)
    return None


def _is_transparent(node: ir.Node, whole: list[int | Dimension]) -> bool:
    """Whether a node leaves the entries as they are, in a row."""
    if node.op_type == "Cast":
        return node.attributes.get_int("to") in _INTEGERS
    return node.op_type == "Identity" or (node.op_type in ("Squeeze", "Unsqueeze") and len(whole) == 1)


def _integers(value: ir.Value, site: Site) -> list[int] | None:
    """Return the numbers of a constant of rank 0 or 1."""
    constant = site.constant(value) if value in site.facts.known else None
    if not isinstance(constant, Constant) or len(constant.shape) > 1:
        return None
    try:
        array = constant.array().reshape(-1)
    except EvaluationError:
        return None
    return [int(number) for number in array] if np.issubdtype(array.dtype, np.integer) else None


def _dimensions(node: ir.Node) -> list[int | Dimension] | None:
    value = operand(node, 0)
    count = rank(value)
    if count is None or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    first, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", count)
    return [Dimension(value, axis) for axis in range(count)[first:end]]


def _part(whole: list[int | Dimension], chosen: list[list[int] | None]) -> list[int | Dimension] | None:
    """Return what Slice leaves, by its starts, ends, axes and steps; before opset 10 they are no inputs."""
    if len(chosen) < 2 or any(numbers is None or len(numbers) != 1 for numbers in chosen):
        return None
    start, end, *rest = [number for numbers in chosen for number in numbers or ()]
    return whole[start:end] if rest in ([], [0], [-1], [0, 1], [-1, 1]) else None
