"""What a row is multiplied by on its way through a quantized layer: a constant times a power of its peak.

Exporters spell the scale 127 / max|x| of a row, its inverse and their products with the scale of a weight in
many ways. Each of them is read here as one `Factor`, together with the order in which it rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Site, made_by, operand, rank
from onnx_bitnet.rewrite.straight_through import straight_through
from onnx_bitnet.rewrite.types import FLOATS, element_type

# Chains of real models are not half as deep; more is another graph, or a malicious one.
DEEPEST = 12
_WIDE = (None, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Factor:
    """coefficient * peak ** power, where peak is max(max|x|, eps) over the last axis of x.

    Args:
        coefficient: float64, one number () or one for each output (N,).
        power: 1, -1, or 0 for a constant.
        x: whose peak it is, as that value is spelled; None for a constant.
        eps: smallest peak; 0 if it has no bound.
        unlike: what no peak of the op's has, empty if there is nothing.
        spelled: the order of operations, with `a` for the peak and `w` for constants other than 1 and 127.
        narrow: the 16-bit type that it is rounded to on its way, or None.
    """

    coefficient: np.ndarray
    power: int = 0
    x: ir.Value | None = None
    eps: float = 0.0
    unlike: str = ""
    spelled: str = "w"
    narrow: ir.DataType | None = None

    @property
    def inverse(self) -> Factor:
        """One divided by it."""
        spelled = f"(1/{self.spelled})"
        return replace(self, coefficient=1 / self.coefficient, power=-self.power, spelled=spelled)

    def times(self, other: Factor, sign: str = "*") -> Factor | None:
        """Multiply by a factor, or divide by it; None if they are of two rows or the powers add up."""
        if self.power and other.power and (self.x is not other.x or self.eps != other.eps):
            return None
        right = other if sign == "*" else other.inverse
        power = self.power + right.power
        if abs(power) > 1:
            return None
        left, constant = (self.spelled, other.spelled)
        if sign == "*" and other.power and not self.power:
            left, constant = constant, left
        row = self if self.power else other
        return replace(
            row,
            coefficient=self.coefficient * right.coefficient,
            power=power,
            spelled=f"({left}{sign}{constant})",
            narrow=self.narrow or other.narrow,
        )


def skip(value: ir.Value) -> ir.Value:
    """Look through what changes neither numbers nor shape: Identity, Cast between floats, and x + (q - x)."""
    for _ in range(DEEPEST):
        source = _skipped(value)
        if source is None:
            break
        value = source
    return value


def _skipped(value: ir.Value) -> ir.Value | None:
    node = made_by(value, "Identity", "Cast")
    if node is not None and (node.op_type == "Identity" or node.attributes.get_int("to") in FLOATS):
        return node.inputs[0]
    return straight_through(value)


def narrowed(value: ir.Value) -> ir.DataType | None:
    """Return the 16-bit type that a value has on its way through what `skip` looks through, or None."""
    for _ in range(DEEPEST):
        dtype = element_type(value)
        if dtype not in _WIDE:
            return dtype
        source = _skipped(value)
        if source is None:
            break
        value = source
    return None


def factor(value: ir.Value, site: Site, depth: int = DEEPEST) -> Factor | None:
    """Read a value as a factor of the rows of some x; None if it is nothing of the kind, or too deep."""
    if value in site.facts.known:
        return _constant(value, site)
    found = _computed(skip(value), site, depth - 1) if depth else None
    if found is None:
        return None
    return replace(found, narrow=found.narrow or narrowed(value))


def _constant(value: ir.Value, site: Site) -> Factor | None:
    """One number, or one for each value of the last axis; None for anything else."""
    array = _numbers(value, site)
    if array is None or not array.size or not np.all(np.isfinite(array)) or np.any(array == 0):
        return None
    if np.all(array == array[0]):
        array = array[0]
    named = {1.0: "1", 127.0: "127"}.get(float(array), "w") if array.ndim == 0 else "w"
    return Factor(array, spelled=named)


def _computed(value: ir.Value, site: Site, depth: int) -> Factor | None:
    if node := made_by(value, "Mul", "Div", "Add", inputs=2):
        return _combined(node, site, depth)
    node = made_by(value, "Reciprocal", "Clip", "Max", "Unsqueeze", "ReduceMax")
    if node is None:
        return None
    match node.op_type:
        case "Reciprocal":
            found = factor(operand(node, 0), site, depth)
            return found and found.inverse
        case "Clip" | "Max":
            return _at_least(node, site, depth)
        case "Unsqueeze":
            return factor(operand(node, 0), site, depth)
        case "ReduceMax":
            return _peak(node, site)
    return None


def _combined(node: ir.Node, site: Site, depth: int) -> Factor | None:
    left = factor(operand(node, 0), site, depth)
    right = left and factor(operand(node, 1), site, depth)
    if left is None or right is None:
        return None
    if node.op_type != "Add":
        return left.times(right, "*" if node.op_type == "Mul" else "/")
    row, constant = (left, right) if left.power else (right, left)
    if row.power != 1 or constant.power or constant.coefficient.ndim:
        return None
    return replace(row, unlike=row.unlike or f"it adds {float(constant.coefficient):g} to the peak")


def _peak(node: ir.Node, site: Site) -> Factor | None:
    """max|x| over the last axis."""
    magnitude = made_by(skip(operand(node, 0)), "Abs")
    if magnitude is None:
        return None
    x = operand(magnitude, 0)
    axes = _axes(node, site)
    last = {-1} if rank(x) is None else {-1, (rank(x) or 0) - 1}
    unlike = (
        "" if axes is not None and len(axes) == 1 and axes[0] in last else "its peak is not that of a row"
    )
    narrow = narrowed(operand(node, 0))
    return Factor(np.ones(()), 1, skip(x), unlike=unlike, spelled="a", narrow=narrow)


def _axes(node: ir.Node, site: Site) -> list[int] | None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = _numbers(node.inputs[1], site)
        return None if array is None else [int(axis) for axis in array]
    axes = node.attributes.get_ints("axes")
    return None if axes is None else list(axes)


def _at_least(node: ir.Node, site: Site, depth: int) -> Factor | None:
    """A factor with a lower bound, by Clip or Max with a constant."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "Max" and len(inputs) == 2 and inputs[0] in site.facts.known:
        inputs.reverse()
    found = factor(inputs[0], site, depth)
    if found is None or found.power != 1 or found.coefficient.ndim:
        return None
    low: float | None
    high: float | None
    if len(inputs) == 1:  # Clip before opset 11
        low, high = node.attributes.get_float("min"), node.attributes.get_float("max")
    else:
        low, high = bound(inputs[1], site), bound(node.inputs[2] if len(node.inputs) > 2 else None, site)
    if low is None:
        return None
    too_low = node.op_type == "Clip" and high is not None and high < np.finfo(np.float32).max
    unlike = found.unlike or (f"it limits the peak to {high:g}" if too_low else "")
    return replace(found, eps=max(found.eps, low / float(found.coefficient)), unlike=unlike)


def bound(value: ir.Value | None, site: Site) -> float | None:
    """Return a constant of one number, such as a bound of Clip; None if it is absent or no such constant."""
    array = _numbers(value, site) if value is not None else None
    return float(array[0]) if array is not None and array.size == 1 else None


def _numbers(value: ir.Value, site: Site) -> np.ndarray | None:
    """Return a constant whose axes but the last are of length 1 as float64; None if it is no such thing."""
    constant = site.constant(value)
    if not isinstance(constant, Constant) or any(dim != 1 for dim in constant.shape[:-1]):
        return None
    try:
        return np.asarray(constant.array(), np.float64).reshape(-1)
    except (EvaluationError, TypeError, ValueError):  # it cannot be computed, or is made of text
        return None
