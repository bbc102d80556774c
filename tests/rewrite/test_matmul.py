"""MatMul, FusedMatMul and the Add behind them: what they become, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite.graphs import MATMULS, K, N, W, build, numbers, ternary
from rewrite.steps import convert, find_one, ops

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Linear, Refusal

AFTER = {
    "matmul": ["MatMulI2S"],
    "matmul_rank_unknown": ["Relu", "MatMulI2S"],
    "matmul_vector": ["MatMulI2S"],
    "matmul_left": ["Transpose", "MatMulI2S", "Transpose"],
    "matmul_left_vector": ["MatMulI2S"],
    "matmul_unit_batch": ["MatMulI2S", "Unsqueeze"],
    "matmul_unit_batch_small_rank": ["MatMulI2S"],
    "matmul_unit_batch_vector_opset_11": ["MatMulI2S", "Unsqueeze"],
    "matmul_unit_batch_left": ["Transpose", "MatMulI2S", "Transpose", "Unsqueeze"],
    "matmul_add": ["MatMulI2S"],
    "matmul_add_left": ["MatMulI2S"],
    "matmul_add_scalar": ["MatMulI2S"],
    "matmul_add_row": ["MatMulI2S"],
    "matmul_add_raises_rank": ["MatMulI2S", "Add"],
    "matmul_add_read_twice": ["MatMulI2S", "Add"],
    "matmul_float16": ["MatMulI2S"],
    "matmul_zero_rows": ["MatMulI2S"],
    "fused_matmul": ["Transpose", "MatMulI2S"],
    "fused_matmul_left": ["MatMulI2S", "Transpose"],
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmul_becomes(name: str):
    assert ops(convert(MATMULS[name].model)) == AFTER[name]


def test_weight_is_oriented_outputs_by_inputs():
    for name in MATMULS:
        linears = find_one(MATMULS[name].model)
        assert isinstance(linears, Linear)
        assert (linears.weight.n, linears.weight.k) == linears.weight.array().shape == (N, K)


def test_alpha_is_in_the_weight():
    linear = find_one(MATMULS["fused_matmul"].model)
    assert isinstance(linear, Linear)
    np.testing.assert_array_equal(linear.weight.array(), ternary(N, K, scale=0.5 * 0.25))


def refused(nodes: str, weights: dict[str, np.ndarray], x: str = f"float[b, {K}] x") -> Refusal:
    found = find_one(build(f"g ({x}) => (float[] y) {{ {nodes} }}", weights, domains=["com.microsoft"]))
    assert isinstance(found, Refusal)
    return found


def test_two_changing_operands_are_refused():
    refusal = refused("t = Transpose (x) \n y = MatMul (x, t)", {})
    assert refusal.reason is Reason.WEIGHT_NOT_CONSTANT
    assert refusal.detail == "'x' is an input"


def test_batch_of_weights_is_refused():
    refusal = refused("y = MatMul (x, W)", {"W": ternary(2, K, N)})
    assert refusal.reason is Reason.WEIGHT_BATCHED
    assert refusal.detail == f"weight 'W' of shape [2, {K}, {N}] is a batch of matrices"


def test_a_vector_is_refused():
    refusal = refused("y = MatMul (x, W)", {"W": ternary(K)})
    assert refusal.reason is Reason.WEIGHT_RANK
    assert refusal.detail == f"weight 'W' of shape [{K}] is no matrix"


@pytest.mark.parametrize(
    ("nodes", "weight"),
    [
        ("h = Relu (x) \n y = MatMul (W, h)", (N, K)),
        ("h = Relu (x) \n y = MatMul (h, W)", (1, K, N)),
        ("h = Relu (x) \n y = com.microsoft.FusedMatMul <transA = 1> (h, W)", (K, N)),
    ],
    ids=["left", "unit batch", "transA"],
)
def test_unknown_rank_is_refused_where_it_matters(nodes: str, weight: tuple[int, ...]):
    refusal = refused(nodes, {"W": ternary(*weight)})
    assert refusal.reason is Reason.RANK_UNKNOWN
    assert refusal.detail == "the rank of 'h' is not stated"
    assert (refusal.n, refusal.k) == (N, K)


def test_transposed_batch_is_refused():
    refusal = refused("y = com.microsoft.FusedMatMul <transBatchA = 1> (x, W)", W)
    assert refusal.reason is Reason.TRANSPOSED_BATCH


@pytest.mark.parametrize(
    ("nodes", "bias"),
    [
        ("p = MatMul (x, W) \n y = Add (p, B)", (3, N)),
        ("p = MatMul (x, W) \n y = Add (p, B)", (3, 1)),
        ("p = MatMul (x, W) \n h = Relu (p) \n y = Add (h, B)", (N,)),
        ("p = MatMul (x, W) \n y = Add (p, p)", (N,)),
        ("p = MatMul (x, W) \n y = Sub (p, B)", (N,)),
    ],
    ids=["matrix", "column", "not next", "itself", "no Add"],
)
def test_add_that_is_no_bias_stays(nodes: str, bias: tuple[int, ...]):
    proto = build(f"g (float[3, {K}] x) => (float[3, {N}] y) {{ {nodes} }}", W | {"B": numbers(*bias)})
    after = convert(proto)
    assert ops(after) == ["MatMulI2S", *ops(proto)[1:]]


def test_add_inside_a_branch_is_no_bias_of_a_layer_outside():
    proto = build(
        f"""g (bool c, float[b, {K}] x) => (float[b, {N}] y) {{
            p = MatMul (x, W)
            y = If (c) <
                then_branch = t () => (float[b, {N}] u) {{ u = Add (p, B) }},
                else_branch = e () => (float[b, {N}] v) {{ v = Identity (x) }}
            >
        }}""",
        W | {"B": numbers(N)},
    )
    linear = find_one(proto)
    assert isinstance(linear, Linear)
    assert linear.bias is None
