"""The element type of a value that the model does not annotate, as TorchScript exports do not."""

from __future__ import annotations

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
# Their output has the type of their first input.
_KEEP_TYPE = frozenset(
    {"Abs", "Add", "Clip", "Concat", "Div", "Dropout", "Erf", "Expand", "Gather", "Gelu", "Gemm", "Identity"}
    | {
        "LayerNormalization",
        "MatMul",
        "Max",
        "Mul",
        "Neg",
        "Pow",
        "RMSNormalization",
        "Reciprocal",
        "ReduceMax",
    }
    | {"ReduceMean", "Relu", "Reshape", "Round", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze"}
    | {"Sub", "Tanh", "Transpose", "Unsqueeze", "Where"}
)
# Where a value keeps the type found for it: else each layer would go back to the input of the model. Who
# changes types takes it away.
FOUND = "onnx_bitnet.element_type"


def element_type(value: ir.Value) -> ir.DataType | None:
    """Return the type that the model states, or that follows from what the value is computed from."""
    way: dict[ir.Value, None] = {}  # a malformed graph may have a cycle
    at: ir.Value | None = value
    found = None
    while at is not None and at not in way and found is None:
        way[at] = None
        found = _own_type(at)
        at = _source(at)
    for passed in way if found is not None else ():
        passed.meta[FOUND] = found
    return found


def _own_type(value: ir.Value) -> ir.DataType | None:
    """Return the type that is known without looking at other values, or was found before."""
    if value.dtype is not None or FOUND in value.meta:
        return value.dtype or ir.DataType(value.meta[FOUND])
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return constant.dtype
    node = value.producer()
    if node is None or node.domain or node.op_type != "Cast":
        return None
    to = node.attributes.get_int("to")
    return None if to is None else ir.DataType(to)


def _source(value: ir.Value) -> ir.Value | None:
    """Return the value that it has the type of, if its node keeps types."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in _KEEP_TYPE:
        return None
    source = 1 if node.op_type == "Where" else 0  # the first is its condition
    return node.inputs[source] if len(node.inputs) > source else None
