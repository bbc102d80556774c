"""Each operator that `distill_onnx` computes in torch: as onnxruntime does, and with a gradient."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch", reason="install the extra [torch]")
from onnx_bitnet.torch.graph import OPERATORS  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 8)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
IMAGE = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32)
CHANNELS = tuple(np.abs(RNG.normal(size=4)).astype(np.float32) for _ in range(4))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weight(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


UNARY = [
    "Abs", "Celu", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Tan", "Tanh",
    "LogSoftmax", "Softmax", "Flatten", "Transpose", "Dropout", "Clip", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare",
]  # fmt: skip
BINARY = [
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "PRelu", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual",
]  # fmt: skip
POOL = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 2, 1]}
REDUCTIONS = [name for name in UNARY if name.startswith("Reduce")]

# operator, opset, attributes, inputs
CASES = [
    *((name, 20, {}, [X]) for name in UNARY),
    *((name, 20, {}, [POSITIVE]) for name in ("Log", "Sqrt", "Reciprocal")),
    *((name, 20, {}, [X, weight(3, 1)]) for name in BINARY),
    *((name, 20, {"keepdims": 0}, [X, ints(0, -1)]) for name in REDUCTIONS),
    *((name, 11, {"axes": [1]}, [X]) for name in REDUCTIONS),
    ("ReduceSum", 20, {"noop_with_empty_axes": 1}, [X, ints()]),
    *((name, 11, {}, [X]) for name in ("Softmax", "LogSoftmax")),
    *((name, 20, {"axis": 1}, [X]) for name in ("Softmax", "LogSoftmax")),
    *((name, 20, {"alpha": 0.3}, [X]) for name in ("Celu", "Elu", "HardSigmoid", "LeakyRelu")),
    ("Gelu", 20, {"approximate": "tanh"}, [X]),
    ("Clip", 10, {"min": -0.5, "max": 0.7}, [X]),
    ("Clip", 20, {}, [X, None, np.float32(0.5)]),
    ("Pow", 20, {}, [POSITIVE, np.float32(1.5)]),
    ("Div", 20, {}, [ints(7, -7), ints(2, 2)]),
    ("MatMul", 20, {}, [X, weight(8, 5)]),
    ("Gemm", 20, {"alpha": 0.5, "transA": 1, "transB": 1}, [weight(4, 3), weight(5, 4)]),
    ("Gemm", 20, {"beta": 2.0}, [weight(4, 3), weight(3, 5), weight(5)]),
    ("Gemm", 20, {}, [weight(4, 3), weight(3, 5)]),
    ("Einsum", 20, {"equation": "b i k, j k -> b i j"}, [X, weight(5, 8)]),
    *((name, 20, {}, [X > 0, X < 1]) for name in ("And", "Or")),
    ("Not", 20, {}, [X > 0]),
    ("Where", 20, {}, [X > 0, X, weight(1)]),
    ("Cast", 20, {"to": TensorProto.FLOAT}, [X > 0]),
    ("Cast", 20, {"to": TensorProto.INT64}, [X]),
    ("Cast", 20, {"to": TensorProto.FLOAT16}, [X]),
    ("Concat", 20, {"axis": -1}, [X, X, POSITIVE]),
    ("Expand", 20, {}, [weight(3, 1), ints(2, 1, 4)]),
    ("Gather", 20, {"axis": 1}, [X, ints(0, -1).reshape(2, 1)]),
    ("Gather", 20, {"axis": -1}, [X, np.array(3)]),
    ("GatherElements", 20, {"axis": 2}, [X, RNG.integers(-8, 8, size=(2, 3, 4))]),
    ("Pad", 20, {}, [X, ints(0, 1, 2, 1, 0, 3)]),
    ("Pad", 20, {}, [X, ints(1, 2), np.float32(0.5), ints(-1)]),
    ("Pad", 20, {"mode": "edge"}, [IMAGE, ints(0, 0, 1, 2, 0, 0, 2, 1)]),
    ("Pad", 20, {"mode": "reflect"}, [IMAGE, ints(0, 0, 1, 2, 0, 0, 2, 1)]),
    ("Pad", 10, {"pads": [0, 1, 0, 0, 0, 2], "value": 0.5}, [X]),
    ("Reshape", 20, {}, [X, ints(0, -1, 2)]),
    ("Reshape", 20, {"allowzero": 1}, [np.zeros((0, 3), np.float32), ints(3, 0)]),
    ("Slice", 20, {}, [X, ints(1, -1), ints(9, -6), ints(1, 2), ints(1, -2)]),
    ("Slice", 20, {}, [X, ints(-1), ints(-100), ints(-1), ints(-1)]),
    ("Slice", 20, {}, [X, ints(1), ints(2)]),
    ("Slice", 9, {"starts": [1], "ends": [3], "axes": [2]}, [X]),
    ("Split", 20, {"axis": 2, "num_outputs": 3}, [X]),
    ("Split", 20, {"axis": 2}, [X, ints(3, 5)]),
    ("Split", 11, {"axis": -1, "split": [2, 6]}, [X]),
    ("Squeeze", 20, {}, [X[:, :1]]),
    ("Squeeze", 20, {}, [X[:1, :1], ints(-2)]),
    ("Squeeze", 11, {"axes": [0]}, [X[:1]]),
    ("Tile", 20, {}, [X, ints(1, 2, 1)]),
    ("Transpose", 20, {"perm": [2, 0, 1]}, [X]),
    ("Unsqueeze", 20, {}, [X, ints(-1, 0)]),
    ("Unsqueeze", 11, {"axes": [1]}, [X]),
    ("Flatten", 20, {"axis": 2}, [X]),
    ("BatchNormalization", 20, {}, [IMAGE, *CHANNELS]),
    ("InstanceNormalization", 20, {"epsilon": 0.1}, [IMAGE, *CHANNELS[:2]]),
    ("GroupNormalization", 20, {"num_groups": 2}, [IMAGE, weight(2), weight(2)]),
    ("GroupNormalization", 21, {"num_groups": 2}, [IMAGE, weight(4), weight(4)]),
    ("LayerNormalization", 20, {}, [X, weight(8)]),
    ("LayerNormalization", 20, {"axis": 1}, [X, weight(3, 8), weight(3, 8)]),
    ("RMSNormalization", 23, {"epsilon": 0.1}, [X, weight(8)]),
    ("Conv", 20, {"pads": [0, 1, 2, 1], "group": 2}, [IMAGE, weight(6, 2, 3, 3), weight(6)]),
    ("Conv", 20, {"strides": [2, 1], "dilations": [2, 1]}, [IMAGE, weight(6, 4, 3, 3)]),
    ("Conv", 20, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [IMAGE, weight(5, 4, 2, 3)]),
    ("Conv", 20, {"auto_pad": "SAME_LOWER", }, [X, weight(5, 3, 2)]),
    *((name, 20, POOL, [IMAGE]) for name in ("AveragePool", "MaxPool")),
    ("AveragePool", 20, {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}, [IMAGE]),
    ("MaxPool", 20, {"kernel_shape": [2, 2], "dilations": [2, 1]}, [IMAGE]),
    *((name, 20, {}, [IMAGE]) for name in ("GlobalAveragePool", "GlobalMaxPool")),
    ("Swish", 24, {"alpha": 1.5}, [X]),
]  # fmt: skip


def node_of(op_type, opset, attributes, inputs):
    names = ["" if array is None else f"x{index}" for index, array in enumerate(inputs)]
    outputs = ["y0", "y1", "y2"][: 3 if "num_outputs" in attributes else 2 if op_type == "Split" else 1]
    node = helper.make_node(op_type, names, outputs, **attributes)
    kinds = [
        (n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
        if n
    ]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(*kind) for kind in kinds],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(
    ("op_type", "opset", "attributes", "inputs"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_it_computes_what_onnxruntime_does(op_type, opset, attributes, inputs):
    inputs = [None if array is None else np.asarray(array) for array in inputs]
    model = node_of(op_type, opset, attributes, inputs)
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        pytest.skip(f"this onnxruntime lacks the operator: {error}")
    expected = session.run(None, {f"x{i}": a for i, a in enumerate(inputs) if a is not None})
    tensors = [None if array is None else torch.tensor(array) for array in inputs]
    learns = tensors[0].is_floating_point() if op_type != "Where" else False
    if learns:
        tensors[0].requires_grad_()
    (node,) = ir.from_proto(model).graph
    got = OPERATORS[op_type](node, *tensors)
    got = (got,) if isinstance(got, torch.Tensor) else got
    for ours, theirs in zip(got, expected, strict=True):
        assert tuple(ours.shape) == theirs.shape
        np.testing.assert_allclose(
            ours.detach().numpy(), theirs, rtol=1e-5, atol=2e-3 if theirs.dtype == np.float16 else 2e-6
        )
        if learns and ours.is_floating_point():
            assert ours.requires_grad


def test_every_operator_has_a_case():
    assert {case[0] for case in CASES} == set(OPERATORS)
