"""What a row is multiplied by on its way through a quantized layer: a constant times a power of its peak.

Exporters spell the scale 127 / max|x| of a row, its inverse and their products with the scale of a weight in
many ways. Each of them is read here as one `Factor`, together with the order in which it rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Site, operand, rank
from onnx_bitnet.rewrite.straight_through import straight_through
from onnx_bitnet.rewrite.types import element_type

FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
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
    while (source := _skipped(value)) is not None:
        value = source
    return value


def _skipped(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Identity":
        return node.inputs[0]
    if node.op_type == "Cast" and node.attributes.get_int("to") in FLOATS:
        return node.inputs[0]
    return straight_through(value)


def narrowed(value: ir.Value) -> ir.DataType | None:
    """Return the 16-bit type that a value has on its way through what `skip` looks through, or None."""
    while value is not None:
        dtype = element_type(value)
        if dtype not in _WIDE:
            return dtype
        source = _skipped(value)
        if source is None:
            return None
        value = source
    return None


def factor(value: ir.Value, site: Site) -> Factor | None:
    """Read a value as a factor of the rows of some x; None if it is nothing of the kind."""
    if value in site.facts.known:
        return _constant(value, site)
    found = _computed(skip(value), site)
    if found is None:
        return None
    return replace(found, narrow=found.narrow or narrowed(value))


def _constant(value: ir.Value, site: Site) -> Factor | None:
    """One number, or one for each value of the last axis; None for anything else."""
    constant = site.constant(value)
    if not isinstance(constant, Constant):
        return None
    *lead, _ = constant.shape or (1,)
    if any(dim != 1 for dim in lead):
        return None
    array = np.asarray(constant.array(), np.float64).reshape(-1)
    if not array.size or not np.all(np.isfinite(array)) or np.any(array == 0):
        return None
    if np.all(array == array[0]):
        array = array[0]
    named = {1.0: "1", 127.0: "127"}.get(float(array), "w") if array.ndim == 0 else "w"
    return Factor(array, spelled=named)


def _computed(value: ir.Value, site: Site) -> Factor | None:
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return None
    match node.op_type:
        case "Mul" | "Div":
            left, right = (factor(operand(node, index), site) for index in (0, 1))
            return left and right and left.times(right, "*" if node.op_type == "Mul" else "/")
        case "Reciprocal":
            found = factor(node.inputs[0], site)
            return found and found.inverse
        case "Clip" | "Max":
            return _at_least(node, site)
        case "Add":
            return _added(node, site)
        case "Unsqueeze":
            return factor(node.inputs[0], site)
        case "ReduceMax":
            return _peak(node, site)
    return None


def _peak(node: ir.Node, site: Site) -> Factor | None:
    """max|x| over the last axis."""
    magnitude = skip(operand(node, 0)).producer()
    if magnitude is None or magnitude.domain or magnitude.op_type != "Abs":
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
        constant = site.constant(node.inputs[1])
        return [int(axis) for axis in constant.array()] if isinstance(constant, Constant) else None
    axes = node.attributes.get_ints("axes")
    return None if axes is None else list(axes)


def _at_least(node: ir.Node, site: Site) -> Factor | None:
    """A factor with a lower bound, by Clip or Max with a constant."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "Max" and len(inputs) == 2 and inputs[0] in site.facts.known:
        inputs.reverse()
    found = factor(inputs[0], site)
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
    constant = site.constant(value) if value is not None else None
    if not isinstance(constant, Constant) or math.prod(constant.shape) != 1:
        return None
    return float(np.asarray(constant.array(), np.float64).reshape(-1)[0])


def _added(node: ir.Node, site: Site) -> Factor | None:
    """A peak with a small constant added to it, which is not the op's way."""
    parts = [factor(operand(node, index), site) for index in (0, 1)]
    row = next((part for part in parts if part is not None and part.power == 1), None)
    constant = next((part for part in parts if part is not None and part.power == 0), None)
    if row is None or constant is None or constant.coefficient.ndim:
        return None
    return replace(row, unlike=row.unlike or f"it adds {float(constant.coefficient):g} to the peak")
