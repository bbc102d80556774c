"""What a graph computes from shapes: the entries of other shapes, and numbers such as 1 / sqrt(width)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Site, made_by, operand, rank

_DEEPEST = 16
_MOST_ENTRIES = 64
_EXACT = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Dimension:
    """How long a value is along an axis, where the model tells no number."""

    value: ir.Value
    axis: int


Entry = int | float | Dimension | None  # None: something else


class Shapes:
    """Reads values that are computed from constants and dimensions, as far as the model tells.

    Inside, a value is an array of entries in the shape that it has in the graph.

    Args:
        site: where the values stand.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._arrays: dict[ir.Value, np.ndarray | None] = {}
        self._depth = 0

    def entries(self, shape: ir.Value) -> list[Entry] | None:
        """Return what the entries of a shape are, or None if not even their number is known."""
        array = self._array(shape)
        return None if array is None or array.ndim > 1 else array.reshape(-1).tolist()

    def number(self, value: ir.Value, most_axes: int) -> float | None:
        """Return the only number in a value that has no more than so many axes, or None."""
        array = self._array(value)
        if array is None or array.size != 1 or array.ndim > most_axes:
            return None
        entry = array.item()
        return float(entry) if isinstance(entry, int | float) else None

    def rank(self, value: ir.Value) -> int | None:
        """Return how many dimensions a value has, as stated or by the Transpose or Reshape that makes it."""
        stated, node = rank(value), value.producer()
        if stated is not None or node is None:
            return stated
        if (axes := permutation(node)) is not None:
            return len(axes)
        entries = self.entries(operand(node, 1)) if _is_reshape(node) else None
        return None if entries is None else len(entries)

    def dimension(self, value: ir.Value, axis: int) -> int | Dimension:
        """Return how long a value is along an axis: a number, or the first dimension that is the same."""
        stated, node = _stated(value, axis), value.producer()
        while stated is None and node is not None and (axes := permutation(node)) and axis < len(axes):
            value, axis = operand(node, 0), axes[axis]
            stated, node = _stated(value, axis), value.producer()
        if stated is not None:
            return stated
        entries = self.entries(operand(node, 1)) if node is not None and _is_reshape(node) else None
        entry = entries[axis] if entries is not None and axis < len(entries) else None
        if isinstance(entry, Dimension) or (isinstance(entry, int) and entry > 0):
            return entry
        return Dimension(value, axis)

    def _array(self, value: ir.Value) -> np.ndarray | None:
        if value not in self._arrays:
            self._arrays[value] = None  # of a cycle, or too deep
            if self._depth < _DEEPEST:
                self._depth += 1
                self._arrays[value] = self._read(value)
                self._depth -= 1
        return self._arrays[value]

    def _read(self, value: ir.Value) -> np.ndarray | None:
        node = value.producer()
        try:
            array = self._constant(value) if value in self._site.facts.known else None
            if array is None and node is not None and not node.domain and not _has_references(node):
                array = self._computed(node)
        except (ArithmeticError, EvaluationError, IndexError, TypeError, ValueError):
            return None
        return array if array is None or array.size <= _MOST_ENTRIES else None

    def _constant(self, value: ir.Value) -> np.ndarray | None:
        constant = self._site.constant(value)
        if not isinstance(constant, Constant) or math.prod(constant.shape) > _MOST_ENTRIES:
            return None
        array = constant.array()
        return array.astype(np.float64).astype(object) if array.dtype.kind == "f" else _integers_of(array)

    def _computed(self, node: ir.Node) -> np.ndarray | None:
        if node.op_type == "Shape":
            return self._shape(node)
        arrays = [None if value is None else self._array(value) for value in node.inputs]
        if node.op_type == "Gather" and arrays[0] is None and made_by(operand(node, 0), "Shape"):
            return None if arrays[1] is None else np.full(arrays[1].shape, None)  # of a shape of unknown rank
        function = _FUNCTIONS.get(node.op_type)
        if function is None or not arrays or any(array is None for array in arrays):
            return None
        return function(node, *arrays)

    def _shape(self, node: ir.Node) -> np.ndarray | None:
        value = operand(node, 0)
        count = self.rank(value)
        if count is None:
            return None
        first, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", count)
        return _objects([self.dimension(value, axis) for axis in range(count)[first:end]])


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """Return the axes of a Transpose that names them, None of any other node."""
    if node.domain or node.op_type != "Transpose":
        return None
    attribute = node.attributes.get("perm")
    return None if attribute is None or attribute.is_ref() else tuple(attribute.as_ints())


def _stated(value: ir.Value, axis: int) -> int | None:
    size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return size if isinstance(size, int) else None


def _is_reshape(node: ir.Node) -> bool:
    return not node.domain and node.op_type == "Reshape" and len(node.inputs) == 2 and None not in node.inputs


def _has_references(node: ir.Node) -> bool:
    return any(attribute.is_ref() for attribute in node.attributes.values())


def _objects(entries: list[int | Dimension]) -> np.ndarray:
    array = np.empty(len(entries), object)
    array[:] = entries
    return array


def _integers_of(array: np.ndarray) -> np.ndarray | None:
    return array.astype(object) if array.dtype.kind in "iu" else None


def _integers(array: np.ndarray) -> np.ndarray:
    """Return an array whose entries are all integers as one of int64."""
    if not all(isinstance(entry, int) for entry in array.flat):
        raise ValueError
    return array.astype(np.int64)


def _each(function: Callable[..., Entry], *arrays: np.ndarray) -> np.ndarray:
    """Return the results of a function for entries of arrays that broadcast."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), object)


# ---- What nodes do to arrays


def _identity(_: ir.Node, x: np.ndarray) -> np.ndarray:
    return x


def _cast(node: ir.Node, x: np.ndarray) -> np.ndarray | None:
    to = node.attributes.get_int("to")
    if to not in _EXACT:
        return None
    kind = int if ir.DataType(to).is_integer() else float

    def cast(entry: Entry) -> Entry:
        if isinstance(entry, int | float):
            return kind(entry)
        return entry if kind is int else None

    return _each(cast, x)


def _concat(node: ir.Node, *arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays, node.attributes.get_int("axis", 0))


def _gather(node: ir.Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.asarray(x.take(_integers(indices), node.attributes.get_int("axis", 0)), object)


def _slice(_: ir.Node, x: np.ndarray, *numbers: np.ndarray) -> np.ndarray | None:
    """By starts, ends, axes and steps, which before opset 10 are no inputs; of a row, every entry."""
    if x.ndim != 1 or len(numbers) < 2 or any(number.size != 1 for number in numbers):
        return None
    start, end, *rest = [int(_integers(number).item()) for number in numbers]
    return x[start:end] if rest in ([], [0], [-1], [0, 1], [-1, 1]) else None


def _reshape(_: ir.Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray | None:
    return None if 0 in shape else x.reshape(_integers(shape))


def _squeeze(node: ir.Node, x: np.ndarray, *axes: np.ndarray) -> np.ndarray:
    return x.squeeze(_axes(node, axes))


def _unsqueeze(node: ir.Node, x: np.ndarray, *axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, _axes(node, axes) or ())


def _axes(node: ir.Node, inputs: tuple[np.ndarray, ...]) -> tuple[int, ...] | None:
    """Return what newer opsets pass as the second input and older ones as an attribute."""
    stated = _integers(inputs[0]).reshape(-1) if inputs else node.attributes.get_ints("axes")
    return None if stated is None else tuple(int(axis) for axis in stated)


def _of_numbers(function: Callable[..., Entry]) -> Callable[..., np.ndarray]:
    """Return what a node does to numbers; the rest becomes None."""

    def apply(*entries: Entry) -> Entry:
        return function(*entries) if all(isinstance(entry, int | float) for entry in entries) else None

    return lambda _, *arrays: _each(apply, *arrays)


def _divided(a: int | float, b: int | float) -> Entry:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b if a >= 0 and b > 0 else None


def _power(a: int | float, b: int | float) -> Entry:
    return math.pow(a, b) if isinstance(a, float) else None


_FUNCTIONS: Mapping[str, Callable[..., np.ndarray | None]] = MappingProxyType(
    {
        "Add": _of_numbers(operator.add),
        "Cast": _cast,
        "Concat": _concat,
        "Div": _of_numbers(_divided),
        "Gather": _gather,
        "Identity": _identity,
        "Mul": _of_numbers(operator.mul),
        "Pow": _of_numbers(_power),
        "Reshape": _reshape,
        "Slice": _slice,
        "Sqrt": _of_numbers(math.sqrt),
        "Squeeze": _squeeze,
        "Sub": _of_numbers(operator.sub),
        "Unsqueeze": _unsqueeze,
    }
)
