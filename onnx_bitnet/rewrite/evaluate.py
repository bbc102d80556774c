"""Compute a constant subgraph: the exporter's, or the training framework's, way to make a weight.

Matching such subgraphs by pattern is hopeless (BitNet exports take 10 to 42 nodes to make one weight), so
they are cut out of the model and run in onnx.reference; what matters is the values that come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_bitnet.errors import EvaluationError, ModelError, one_line
from onnx_bitnet.rewrite.origins import OpId

# Initializers up to this many elements may be shapes and axes, which shape inference needs to see.
_SMALL = 64
_IR_VERSION = 10


def computed(
    value: ir.Value, imports: Mapping[str, int], functions: Mapping[OpId, ir.Function]
) -> ir.LazyTensor:
    """Return a known value as a tensor whose data is computed when asked for, each time anew.

    Shape and type are those that the model states; else they are inferred; else the value is computed once.

    Args:
        value: computed by nodes, from initializers and Constant nodes alone.
        imports: opset imports of the graph it is in.
        functions: the model's functions.

    Raises:
        EvaluationError: now or when the data is asked for: the subgraph cannot be computed.
    """
    shape, dtype = (
        _stated(value) or _inferred(value, imports, functions) or _measured(value, imports, functions)
    )

    def data() -> ir.TensorProtocol:
        array = _run(value, imports, functions)
        if array.shape != shape:
            raise EvaluationError(
                f"{value.name!r}: the model states shape {shape}, it computes to {array.shape}"
            )
        # the evaluator may compute in a wider type than the operator's
        return ir.tensor(array.astype(dtype.numpy(), copy=False), dtype=dtype)

    return ir.LazyTensor(data, dtype, ir.Shape(shape), name=value.name)


def _stated(value: ir.Value) -> tuple[tuple[int, ...], ir.DataType] | None:
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy(), value.dtype


def _inferred(
    value: ir.Value, imports: Mapping[str, int], functions: Mapping[OpId, ir.Function]
) -> tuple[tuple[int, ...], ir.DataType] | None:
    nodes, leaves = _extract(value)
    small = [leaf for leaf in leaves if leaf.const_value is not None and leaf.const_value.size <= _SMALL]
    large = [leaf for leaf in leaves if leaf not in small]
    try:
        proto = _model(value, nodes, large, small, imports, functions)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # whatever it trips over, computing the value will tell
        return None
    return _stated(ir.from_proto(inferred.graph.output[0]))


def _measured(
    value: ir.Value, imports: Mapping[str, int], functions: Mapping[OpId, ir.Function]
) -> tuple[tuple[int, ...], ir.DataType]:
    array = _run(value, imports, functions)
    return array.shape, ir.DataType.from_numpy(array.dtype)


def _run(value: ir.Value, imports: Mapping[str, int], functions: Mapping[OpId, ir.Function]) -> np.ndarray:
    """Compute the value, in the type that the evaluator gives it."""
    nodes, leaves = _extract(value)
    if len({leaf.name for leaf in leaves}) < len(leaves):
        raise EvaluationError(f"{value.name!r}: two of the values that it is computed from have one name")
    feeds = {
        str(leaf.name): load(leaf.const_value, leaf.name) for leaf in leaves if leaf.const_value is not None
    }
    try:
        proto = _model(value, nodes, leaves, [], imports, functions)
        evaluator = ReferenceEvaluator(proto, new_ops=_missing_ops(imports))
        with np.errstate(all="ignore"):
            (array,) = cast(list[object], evaluator.run(None, feeds))
    except Exception as error:  # the evaluator raises whatever NumPy and its own ops raise
        raise EvaluationError(
            f"{value.name!r}: its constant subgraph cannot be computed: {one_line(error)}"
        ) from None
    if not isinstance(array, (np.ndarray, np.generic)) or array.dtype == object:
        raise EvaluationError(f"{value.name!r}: its constant subgraph does not make a tensor of numbers")
    return np.asarray(array)


def load(tensor: ir.TensorProtocol, name: str | None) -> np.ndarray:
    """Return a tensor's data.

    Raises:
        ModelError: the file it is in is missing or too short, or the tensor contradicts itself.
        EvaluationError: it is a computed one, and that failed.
    """
    try:
        return tensor.numpy()
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, OverflowError, AssertionError, MemoryError) as error:
        raise ModelError(f"weight {name!r}: cannot read its data: {one_line(error)}") from None


class DequantizeLinear(OpRun):
    """The operator as it was before opset 19, which onnx.reference lacks; it finds the class by its name."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray | None = None,
        *,
        axis: int = 1,
        **_: object,
    ) -> tuple[np.ndarray]:
        shape = [1] * x.ndim
        if scale.size > 1:
            shape[axis] = scale.size
        centred = x.astype(np.int32)
        if zero_point is not None:
            centred = centred - zero_point.astype(np.int32).reshape(shape)
        return ((centred * scale.reshape(shape)).astype(scale.dtype),)


def _missing_ops(imports: Mapping[str, int]) -> list[type[OpRun]]:
    return [DequantizeLinear] if imports.get("", 0) < 19 else []


def leaves(value: ir.Value) -> list[ir.Value]:
    """Return the initializers and Constants that a value comes from."""
    nodes, initializers = _extract(value)
    return [*initializers, *(node.outputs[0] for node in nodes if not node.inputs)]


def _extract(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return the nodes that the value is computed by, in order, and the initializers they start from."""
    done: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}
    stack: list[tuple[ir.Value, bool]] = [(value, False)]
    while stack:
        current, inputs_done = stack.pop()
        node = current.producer()
        if node is None:
            leaves[current] = None
        elif inputs_done:
            done[node] = None
        elif node not in done:
            stack.append((current, True))
            stack.extend((source, False) for source in node.inputs if source is not None)
    return list(done), list(leaves)


def _model(
    value: ir.Value,
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    initializers: list[ir.Value],
    imports: Mapping[str, int],
    functions: Mapping[OpId, ir.Function],
) -> onnx.ModelProto:
    graph = ir.GraphView(
        inputs, [value], nodes=nodes, initializers=initializers, opset_imports=dict(imports), name="constant"
    )
    called = functions.values() if any(node.domain for node in nodes) else ()
    model = ir.Model(graph, ir_version=_IR_VERSION, functions=list(called))  # type: ignore[arg-type]
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto
