"""Gemm: what it becomes for each form of C, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite.graphs import GEMMS, K, N, W, build, numbers, ternary
from rewrite.steps import convert, find_one, initializers, ops

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Linear, Refusal

AFTER = {
    "gemm": ["MatMulI2S"],
    "gemm_bias": ["MatMulI2S"],
    "gemm_factors": ["Transpose", "MatMulI2S"],
    "gemm_scalar_bias": ["Transpose", "MatMulI2S"],
    "gemm_one_bias": ["MatMulI2S"],
    "gemm_column": ["MatMulI2S", "Mul", "Add"],
    "gemm_matrix": ["MatMulI2S", "Add"],
    "gemm_beta_0": ["MatMulI2S"],
    "gemm_left": ["Transpose", "MatMulI2S", "Transpose"],
    "gemm_left_row": ["MatMulI2S", "Transpose", "Add"],
    "gemm_dynamic_c": ["MatMulI2S", "Mul", "Add"],
}


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_becomes(name: str):
    assert ops(convert(GEMMS[name].model)) == AFTER[name]


def test_factors_are_in_weight_and_bias():
    linear = find_one(GEMMS["gemm_factors"].model)
    assert isinstance(linear, Linear)
    assert linear.bias is not None
    np.testing.assert_array_equal(linear.weight.array(), 2 * ternary(K, N).T)
    np.testing.assert_array_equal(linear.bias.array(), numbers(1, N) / 2)


def test_c_times_0_is_dropped():
    assert "C" not in initializers(convert(GEMMS["gemm_beta_0"].model))


def test_two_changing_operands_are_refused():
    found = find_one(build(f"g (float[2, {K}] x, float[{K}, 3] w) => (float[2, 3] y) {{ y = Gemm (x, w) }}"))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_CONSTANT


def test_weight_that_is_no_matrix_is_refused():
    found = find_one(build(f"g (float[2, {K}] x) => (float[] y) {{ y = Gemm (x, W) }}", {"W": ternary(K)}))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_RANK


def test_factor_that_is_an_argument_is_inlined():
    proto = build(
        f"g (float[2, {K}] x) => (float[2, {N}] y) {{ y = local.Scaled <a = 2.0> (x) }}",
        domains=["local"],
        functions="""<domain: "local", opset_import: ["" : 18]>
        Scaled <a> (x) => (y)
        {
            w = ConstantOfShape <value = float[1] {0.5}> (shape)
            y = Gemm <alpha: float = @a> (x, w)
        }""".replace("w =", f"shape = Constant <value_ints = [{K}, {N}]> ()\nw ="),
    )
    refusal = find_one(proto)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.WEIGHT_IS_ARGUMENT
    assert refusal.detail == "attribute 'alpha' is an argument of the function"
    after = convert(proto)
    assert [node for node in ops(after) if node == "MatMulI2S"]
    assert [function.name for function in after.functions] == ["MatMulI2S"]


def test_dynamic_c_keeps_the_weight_constant():
    linear = find_one(
        build(f"g (float[2, {K}] x, float[2, {N}] c) => (float[2, {N}] y) {{ y = Gemm (x, W, c) }}", W)
    )
    assert isinstance(linear, Linear)
    assert linear.addend is not None
    assert linear.addend.name == "c"
