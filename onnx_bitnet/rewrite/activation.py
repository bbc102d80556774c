"""The quantization of activations in the graph, folded into the op where it is the op's own.

BitNet's layers multiply ternary weights with 8-bit integers: q = clamp(round(x * s), -128, 127) with
s = 127 / max(max|x|, 1e-5) of each row. A graph does so in one of two ways:

1. fake quantization: x' = q / s goes into the product (AutoBitLinear of transformers, most training code);
2. integers: q goes into the product, and what comes out is divided by s and by the scale of the weight
   (BitLinear of transformers and other code for inference).

Both become an op with 8 activation bits, which reads x itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.rewrite.bias import only_reader
from onnx_bitnet.rewrite.factors import DEEPEST, Factor, bound, factor, skip
from onnx_bitnet.rewrite.records import Activations, Linear, Site, made_by, operand
from onnx_bitnet.rewrite.types import FLOATS, element_type

_LEVELS = 127
_EPS = 1e-5
# float32 sums of products of this many integers up to 127 with -1, 0 and 1 are exact.
_EXACT_INPUTS = (1 << 24) // (_LEVELS + 1)
_SIGNED = (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, *FLOATS)
# 1e-5 is rounded to the type of the graph, which may be of 16 bits.
_TOLERANCE = 1 / 128


@dataclass(frozen=True, eq=False)
class _Integers:
    """q = clamp(round(x * scale), low, high), as it stands in a graph.

    Args:
        reader: the node that reads x.
        index: which of its inputs x is.
        scale: s.
        low: lower bound, -inf if there is none.
        high: upper bound.
        by_product: x is multiplied by s, not divided by its inverse.
    """

    reader: ir.Node
    index: int
    scale: Factor
    low: float
    high: float
    by_product: bool

    @property
    def unlike(self) -> str:
        """What differs from the op's way; empty if nothing does."""
        levels = float(self.scale.coefficient) if self.scale.coefficient.ndim == 0 else np.nan
        x = operand(self.reader, self.index)
        if self.scale.unlike:
            return self.scale.unlike
        if self.scale.power != -1 or skip(x) is not self.scale.x:
            return "the scale is not made of the row's own peak"
        if not np.isclose(levels, _LEVELS, rtol=1e-3):
            return f"it has {levels:g} levels, the op has {_LEVELS}"
        if not np.isclose(self.scale.eps, _EPS, rtol=_TOLERANCE):
            return f"its smallest peak is {self.scale.eps:g}, the op's is {_EPS:g}"
        if self.low > -_LEVELS or self.high < _LEVELS:
            return f"it clips to {self.low:g} .. {self.high:g}, the op to {-_LEVELS - 1} .. {_LEVELS}"
        return ""

    @property
    def integer(self) -> bool:
        """Whether q is known to be from -128 to 127."""
        return not self.unlike or (self.low >= -_LEVELS - 1 and self.high <= _LEVELS)

    @property
    def rounding(self) -> str:
        """Where the integers are rounded otherwise than the op's, so that some may differ by one."""
        if self.scale.narrow is not None:
            return f"the graph rounds the scale of a row to {self.scale.narrow.name.lower()}"
        if self.scale.spelled != "((1/a)*127)" or not self.by_product:
            return "the graph rounds the scale of a row in another order"
        return ""


def quantization(linear: Linear, site: Site) -> Linear:
    """Return the layer with what is known of the quantization of its activations.

    None of it is folded unless the op computes the same; `activations.unlike` says why not.
    """
    if linear.before or linear.after or linear.addend_index is not None:
        return linear
    x = skip(linear.x)
    found = _integers(x, site)
    if found is not None:
        return _integer_product(linear, found, site)
    node = made_by(x, "Mul", "Div", inputs=2)
    if node is None:
        return linear
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        found = _integers(skip(operand(node, index)), site)
        step = factor(operand(node, 1 - index), site) if found is not None else None
        if found is not None and step is not None:
            return _fake_quantized(linear, found, step if node.op_type == "Mul" else step.inverse)
    return linear


def _integers(value: ir.Value, site: Site) -> _Integers | None:
    """Read q backwards from its value."""
    low, high = -np.inf, np.inf
    for _ in range(DEEPEST):
        limit = _limit(value, site)
        if limit is None:
            break
        value, least, most = limit
        low, high = max(low, least), min(high, most)
    rounding = made_by(skip(value), "Round")
    node = rounding and made_by(skip(operand(rounding, 0)), "Mul", "Div", inputs=2)
    if node is None:
        return None
    by_product = node.op_type == "Mul"
    for index in (0, 1) if by_product else (0,):
        scale = factor(operand(node, 1 - index), site)
        if scale is not None and operand(node, index) not in site.facts.known:
            return _Integers(node, index, scale if by_product else scale.inverse, low, high, by_product)
    return None


def _limit(value: ir.Value, site: Site) -> tuple[ir.Value, float, float] | None:
    """Return what a node limits, and its bounds; None if it is no such node."""
    node = made_by(value, "Cast", "Clip") or made_by(value, "Max", "Min", inputs=2)
    if node is None:
        return None
    match node.op_type:
        case "Cast":
            to = node.attributes.get_int("to")
            most = 127 if to == ir.DataType.INT8 else np.inf
            return (operand(node, 0), -1 - most, most) if to in _SIGNED else None
        case "Clip":
            low, high = (bound(node.inputs[i], site) if len(node.inputs) > i else None for i in (1, 2))
            if len(node.inputs) == 1:  # before opset 11
                low, high = node.attributes.get_float("min"), node.attributes.get_float("max")
            return operand(node, 0), *_open(low, high)
        case "Max" | "Min" if len(node.inputs) == 2:
            for index in (0, 1):
                limit = bound(operand(node, 1 - index), site)
                if limit is not None:
                    low, high = (limit, None) if node.op_type == "Max" else (None, limit)
                    return operand(node, index), *_open(low, high)
    return None


def _open(low: float | None, high: float | None) -> tuple[float, float]:
    return -np.inf if low is None else low, np.inf if high is None else high


def _fake_quantized(linear: Linear, found: _Integers, back: Factor) -> Linear:
    """Case 1: x' = q * back."""
    product = found.scale.times(back)
    if not found.unlike and (product is None or product.power or not _is_one(product.coefficient)):
        unlike = "its integers are not divided by the scale that made them"
        return replace(linear, activations=Activations(unlike))
    rounding = found.rounding or "the graph rounds each dequantized activation"
    return _folded(linear, linear, found, Activations(found.unlike, rounding))


def _integer_product(linear: Linear, found: _Integers, site: Site) -> Linear:
    """Case 2: what is multiplied with the weight is q."""
    if linear.bias is not None:
        unlike = "a bias is added before the products are scaled back"
        return replace(linear, activations=Activations(found.unlike or unlike, integer=found.integer))
    total = Factor(np.ones(()), spelled="")
    absorbed: list[ir.Node] = []
    y = linear.y
    while total.power == 0 and (node := only_reader(y)) is not None and node.op_type in ("Mul", "Div"):
        index = 1 if operand(node, 0) is y else 0
        other = factor(operand(node, index), site) if not (index == 0 and node.op_type == "Div") else None
        if other is None or node.graph is not linear.node.graph:
            break
        more = total.times(other, "*" if node.op_type == "Mul" else "/")
        if more is None:
            break
        total = more if absorbed else replace(more, spelled=other.spelled)
        absorbed.append(node)
        y = node.outputs[0]
    unlike = found.unlike
    per_output = total.coefficient.ndim and total.coefficient.size != linear.weight.n
    if not unlike and (total.power != 1 or total.x is not found.scale.x or per_output):
        unlike = "its products are not scaled back by the factor of the row"
    coefficient = (total.coefficient * _LEVELS).tolist()
    step = tuple(coefficient) if isinstance(coefficient, list) else coefficient
    activations = Activations(unlike, found.rounding or _order(total, absorbed, linear), found.integer, step)
    if unlike:
        return replace(linear, activations=activations)
    scaled = replace(linear, absorbed=tuple(absorbed), weight=linear.weight.scale(step))
    return _folded(linear, scaled, found, activations)


def _order(total: Factor, absorbed: list[ir.Node], linear: Linear) -> str:
    """Where the products of integers are scaled otherwise than by the op: product * ((a / 127) * scale)."""
    if linear.weight.k > _EXACT_INPUTS:
        return "float32 does not hold the sums of so many inputs"
    if (element_type(linear.x) or linear.weight.dtype) != ir.DataType.FLOAT:
        return "the graph rounds the products of integers"
    once = [node.op_type for node in absorbed] == ["Mul"]
    exact = once and total.spelled in ("((a/127)*w)", "(a/127)")
    return "" if exact else "the graph scales the products in another order"


def _folded(linear: Linear, scaled: Linear, found: _Integers, activations: Activations) -> Linear:
    """Add the scaled layer as one that reads x itself, unless the graph's way is not the op's."""
    if not activations.unlike:
        place = _typed(found, element_type(linear.x) or linear.weight.dtype)
        if place is not None:
            reader, index = place
            folded = replace(scaled, reader=reader, x_index=index, activations=activations)
            return replace(linear, activations=activations, folded=folded)
        activations = replace(activations, unlike="it is of another type than the product")
    return replace(linear, activations=activations)


def _typed(found: _Integers, dtype: ir.DataType) -> tuple[ir.Node, int] | None:
    """Return where x is read as a value of the wanted type, before as many Casts as possible."""
    node, index, place = found.reader, found.index, None
    for _ in range(DEEPEST):
        x = operand(node, index)
        if element_type(x) == dtype:
            place = node, index
        cast = made_by(x, "Cast", "Identity")
        if cast is None:
            break
        node, index = cast, 0
        if (element_type(operand(node, 0)) or dtype).itemsize > (element_type(x) or dtype).itemsize:
            break
    return place


def _is_one(coefficient: np.ndarray) -> bool:
    return coefficient.ndim == 0 and bool(np.isclose(coefficient, 1, rtol=1e-3))
