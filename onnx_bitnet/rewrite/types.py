"""The element type of a value that the model does not annotate, as TorchScript exports do not."""

from __future__ import annotations

import onnx_ir as ir

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


def element_type(value: ir.Value) -> ir.DataType | None:
    """Return the type that the model states, or that follows from what the value is computed from."""
    seen: set[ir.Value] = set()  # a malformed graph may have a cycle
    while value not in seen:
        seen.add(value)
        if value.dtype is not None:
            return value.dtype
        node = value.producer()
        constant = ir.convenience.get_const_tensor(value)
        if constant is not None:
            return constant.dtype
        if node is None or node.domain:
            return None
        if node.op_type == "Cast":
            to = node.attributes.get_int("to")
            return None if to is None else ir.DataType(to)
        source = 1 if node.op_type == "Where" else 0  # the first is its condition
        if node.op_type not in _KEEP_TYPE or len(node.inputs) <= source:
            return None
        following = node.inputs[source]
        if following is None:
            return None
        value = following
    return None
