"""Constant operands: where their values come from and how they are turned, loaded only when needed.

A constant is a stored or computed tensor seen through views: the Transposes, Reshapes and the like between
it and the layer become NumPy views, so a weight is never copied, and two layers that see the same tensor in
the same way can share what is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import EvaluationError, ModelError, one_line
from onnx_bitnet.rewrite.evaluate import computed, leaves, load
from onnx_bitnet.rewrite.origins import OpId
from onnx_bitnet.rewrite.straight_through import straight_through


@dataclass(frozen=True)
class View:
    """A NumPy view: `transpose` by a permutation or `reshape` to a shape."""

    method: str
    value: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant operand of a layer; for a weight, oriented (N, K).

    Args:
        source: the value that the tensor belongs to: an initializer or the output of a node.
        tensor: its data, loaded or computed when asked for.
        shape: what is seen through the views.
        views: from the tensor to what the layer sees.
        factor: what the values are multiplied by, such as Gemm's alpha: one number, or one for each index of
            the first axis, that is for each output of a weight.
        dtype_seen: type that the layer sees, if a Cast gives the tensor a wider one.
    """

    source: ir.Value
    tensor: ir.TensorProtocol
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()
    factor: float | tuple[float, ...] = 1.0
    dtype_seen: ir.DataType | None = None

    @property
    def n(self) -> int:
        """Outputs of the layer."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Inputs of the layer."""
        return self.shape[1]

    @property
    def name(self) -> str:
        """Name of the weight in the model."""
        return self.source.name or "weight"

    @property
    def dtype(self) -> ir.DataType:
        """Type that the layer sees, before the factor."""
        return self.dtype_seen or self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values, in the type that the layer sees."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def file_bytes(self) -> int:
        """Size of the tensors in the model that the values come from."""
        return sum(leaf.const_value.nbytes for leaf in leaves(self.source) if leaf.const_value is not None)

    @property
    def stored(self) -> bool:
        """Whether the tensor is in the file, as an initializer or a Constant node, not computed."""
        return not isinstance(self.tensor, ir.LazyTensor)

    @property
    def key(self) -> Hashable:
        """Equal for constants that are the same tensor seen in the same way."""
        return self.source, self.views, self.factor

    def array(self) -> np.ndarray:
        """Load the values, in their own type and without a copy; float32 and copied if there is a factor.

        Valid until `cleanup` removes the nodes that compute them.

        Raises:
            ModelError: the tensor's data cannot be read.
            EvaluationError: the subgraph that makes it cannot be computed.
        """
        array = load(self.tensor, self.name)
        for view in self.views:
            array = getattr(array, view.method)(view.value)
        # One multiplication of float32: a ternary weight stays ternary, its scale is rounded once.
        if self.dtype_seen is not None:
            array = array.astype(self.dtype_seen.numpy())
        if self.factor == 1.0:
            return array
        factor = np.asarray(self.factor, np.float32)
        wide = array.astype(np.float32)
        return wide * (factor.reshape(-1, *[1] * (wide.ndim - 1)) if factor.ndim else factor)

    def transpose(self, *permutation: int) -> Constant:
        """See the axes in another order."""
        if permutation == tuple(range(len(self.shape))):
            return self
        shape = tuple(self.shape[axis] for axis in permutation)
        if self.views and self.views[-1].method == "transpose":
            last = self.views[-1].value
            undone = replace(
                self, views=self.views[:-1], shape=tuple(self.shape[last.index(i)] for i in range(len(last)))
            )
            return undone.transpose(*(last[axis] for axis in permutation))
        return replace(self, shape=shape, views=(*self.views, View("transpose", permutation)))

    def reshape(self, *shape: int) -> Constant:
        """See the values in another shape of the same size."""
        if shape == self.shape:
            return self
        views = self.views[:-1] if self.views and self.views[-1].method == "reshape" else self.views
        if not views and shape == tuple(self.tensor.shape):
            return replace(self, shape=shape, views=())
        return replace(self, shape=shape, views=(*views, View("reshape", shape)))

    def scale(self, factor: float | tuple[float, ...]) -> Constant:
        """See the values multiplied, by one number or by one for each index of the first axis."""
        product = np.multiply(self.factor, factor)
        return replace(self, factor=tuple(product.tolist()) if product.ndim else float(product))


def find(value: ir.Value, imports: Mapping[str, int], functions: Mapping[OpId, ir.Function]) -> Constant:
    """Return a known value as a constant, looking through the nodes that only rearrange it.

    A straight-through estimator w + (q - w) is taken for q.

    Args:
        value: one of `Facts.known`.
        imports: opset imports of the graph it is in.
        functions: `Facts.functions`.

    Raises:
        EvaluationError: it comes from a constant subgraph that cannot be computed.
    """
    rearrangers: list[ir.Node] = []
    while stored_tensor(value) is None:
        node = value.producer()
        if (q := straight_through(value)) is not None:
            value = q
            continue
        if node is None or not _rearranges(node) or node.inputs[0] is None:
            break
        rearrangers.append(node)
        value = node.inputs[0]
    tensor = stored_tensor(value) or computed(value, imports, functions)
    constant = Constant(value, tensor, _checked_shape(tensor, value.name))
    for node in reversed(rearrangers):
        constant = _rearranged(constant, node)
    return constant


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node, None for anything else."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.domain or node.op_type != "Constant" or len(node.attributes) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in ("value_float", "value_floats"):
        return ir.Tensor(np.array(attribute.value, np.float32))
    if attribute.name in ("value_int", "value_ints"):
        return ir.Tensor(np.array(attribute.value, np.int64))
    return None


def _checked_shape(tensor: ir.TensorProtocol, name: str | None) -> tuple[int, ...]:
    """Return the shape of a tensor whose shape and type make sense."""
    try:
        shape, _ = tensor.shape.numpy(), tensor.dtype
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {list(shape)}")
    except ValueError as error:
        raise ModelError(f"weight {name!r}: {one_line(error)}; the model is not valid") from None
    return tuple(shape)


def _rearranges(node: ir.Node) -> bool:
    """Whether the node is a view whose parameters are stored, or a Cast that changes no value."""
    if not node.domain and node.op_type == "Cast":
        return node.attributes.get_int("to") == ir.DataType.FLOAT and _is_16_bits(node.inputs[0])
    if node.domain or node.op_type not in ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
        return False
    return all(value is None or stored_tensor(value) is not None for value in node.inputs[1:])


def _is_16_bits(value: ir.Value | None) -> bool:
    """Whether a value is known to be float16 or bfloat16."""
    tensor = value and stored_tensor(value)
    dtype = tensor.dtype if tensor is not None else value and value.dtype
    return dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _rearranged(constant: Constant, node: ir.Node) -> Constant:
    shape = constant.shape
    try:
        match node.op_type:
            case "Cast":
                return replace(constant, dtype_seen=ir.DataType.FLOAT)
            case "Transpose":
                permutation = node.attributes.get_ints("perm") or range(len(shape))[::-1]
                if sorted(permutation) != list(range(len(shape))):
                    raise ValueError
                return constant.transpose(*permutation)
            case "Reshape":
                target = _ints(node, "shape") or []
                return constant.reshape(*_target(shape, target, node.attributes.get_int("allowzero", 0)))
            case "Squeeze":
                axes = _ints(node, "axes")
                squeezed = (
                    {a % len(shape) for a in axes}
                    if axes is not None
                    else {i for i, d in enumerate(shape) if d == 1}
                )
                return constant.reshape(*(d for i, d in enumerate(shape) if i not in squeezed))
            case "Unsqueeze":
                return constant.reshape(*_unsqueezed(shape, _ints(node, "axes") or []))
    except (IndexError, ValueError, ZeroDivisionError):
        raise EvaluationError(
            f"{node.outputs[0].name!r}: {node.op_type} does not fit a constant of shape {list(shape)}"
        ) from None
    return constant


def _ints(node: ir.Node, name: str) -> list[int] | None:
    """Return what newer opsets pass as the second input and older ones as an attribute."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = stored_tensor(node.inputs[1])
        return None if tensor is None else [int(i) for i in tensor.numpy().reshape(-1)]
    values = node.attributes.get_ints(name)
    return None if values is None else list(values)


def _target(shape: tuple[int, ...], target: Sequence[int], allowzero: int) -> tuple[int, ...]:
    filled = [shape[i] if d == 0 and not allowzero else d for i, d in enumerate(target)]
    if -1 in filled:
        known = math.prod(d for d in filled if d != -1)
        filled[filled.index(-1)] = math.prod(shape) // known
    if math.prod(filled) != math.prod(shape) or min(filled, default=0) < 0:
        raise ValueError
    return tuple(filled)


def _unsqueezed(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    rank = len(shape) + len(axes)
    ones = {axis % rank for axis in axes}
    if len(ones) < len(axes):
        raise ValueError
    dims = iter(shape)
    return tuple(1 if i in ones else next(dims) for i in range(rank))
