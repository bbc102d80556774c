"""Layers in the bodies of the model's own functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrite.graphs import FUNCTIONS, K, N, build, numbers, ternary
from rewrite.steps import convert, find, initializers, ops, reference, stock

from onnx_bitnet.errors import ModelError
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Refusal
from onnx_bitnet.rewrite.scan import inline_weight_arguments

PROJECT = """<domain: "local", opset_import: ["" : %d]>
Project (x, weight) => (y)
{
    turned = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, turned)
}"""


def test_weight_in_a_body_is_packed_once_for_all_calls():
    model = convert(FUNCTIONS["function_weight_in_body"].model)
    assert ops(model) == ["Dense", "Dense", "Add"]
    packed, dense = model.functions
    assert (packed.name, dense.name) == ("MatMulI2S", "Dense")
    # three Constants for the packed weight and the one that is the bias
    assert sorted(node.op_type for node in dense.node) == ["Constant"] * 4 + ["MatMulI2S"]
    assert {i.domain for i in dense.opset_import} == {"", "onnx_bitnet"}


def test_place_is_told():
    (layer,) = find(FUNCTIONS["function_weight_in_body"].model)
    assert layer.where == "function local::Dense"


def test_weight_that_is_an_argument_is_inlined():
    proto = FUNCTIONS["function_weight_argument"].model
    first = find(proto)[0]
    assert isinstance(first, Refusal)
    assert first.reason is Reason.WEIGHT_IS_ARGUMENT
    assert first.detail == "'turned' is made of arguments of the function"
    model = convert(proto)
    assert ops(model) == ["MatMulI2S", "MatMulI2S"]
    assert [function.name for function in model.functions] == ["MatMulI2S"]
    assert {"V.i2s", "W.i2s"} <= initializers(model).keys()


def test_only_functions_with_such_weights_are_inlined():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {N}] y) {{
            a = local.Project (x, W)
            b = local.Square (a)
            y = local.Attend (b, a)
        }}""",
        {"W": ternary(N, K)},
        domains=["local"],
        functions=PROJECT % 18
        + """<domain: "local", opset_import: ["" : 18]> Square (x) => (y) { y = Mul (x, x) }
        <domain: "local", opset_import: ["" : 18]>
        Attend (q, k) => (y) { t = Transpose (k) \n s = MatMul (q, t) \n y = MatMul (s, k) }""",
    )
    model = convert(proto)
    assert ops(model) == ["MatMulI2S", "Square", "Attend"]
    reasons = [layer.reason for layer in find(model) if isinstance(layer, Refusal)]
    assert reasons == [Reason.WEIGHT_NOT_CONSTANT] * 2
    feeds = {"x": numbers(3, K)}
    np.testing.assert_array_equal(stock(model, feeds)[0], reference(proto, feeds)[0])


@pytest.mark.parametrize("before", ["p = local.Project (x, w)", "n = Neg (w) p = local.Project (x, n)"])
def test_argument_that_goes_through_two_functions_is_inlined(before):
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = local.Outer (x, W) }}",
        {"W": ternary(N, K)},
        domains=["local"],
        functions=PROJECT % 18
        + f"""<domain: "local", opset_import: ["" : 18, "local" : 1]>
        Outer (x, w) => (y) {{ {before} y = Relu (p) }}""",
    )
    model = convert(proto)
    assert ops(model) == ["MatMulI2S", "Relu"]
    feeds = {"x": numbers(3, K)}
    np.testing.assert_array_equal(stock(model, feeds)[0], reference(proto, feeds)[0])


def test_function_of_another_opset_stays_and_is_refused():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = local.Project (x, W) }}",
        {"W": ternary(N, K)},
        domains=["local"],
        functions=PROJECT % 17,
    )
    model = ir.from_proto(proto)
    inline_weight_arguments(model)
    assert [function.name for function in model.functions.values()] == ["Project"]
    (found,) = find(ir.to_proto(model))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_IS_ARGUMENT


def test_without_weight_arguments_nothing_is_inlined():
    proto = FUNCTIONS["function_weight_in_body"].model
    model = ir.from_proto(proto)
    inline_weight_arguments(model)
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


def test_function_that_nothing_calls_stays():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {K}] y) {{ y = Relu (x) }}",
        domains=["local"],
        functions=f"""<domain: "local", opset_import: ["" : 18]>
        Scaled <a> (x, s) => (y)
        {{
            shape = Constant <value_ints = [{K}, {N}]> ()
            w = ConstantOfShape (shape)
            y = Gemm <alpha: float = @a> (x, w)
        }}""",
    )
    model = ir.from_proto(proto)
    inline_weight_arguments(model)
    assert [function.name for function in model.functions.values()] == ["Scaled"]


def test_product_of_activations_with_an_argument_as_factor_stays():
    proto = build(
        f"g (float[{K}, {K}] x) => (float[{K}, {K}] y) {{ y = local.Scores <a = 2.0> (x) }}",
        domains=["local"],
        functions="""<domain: "local", opset_import: ["" : 18]>
        Scores <a> (x) => (y) { y = Gemm <alpha: float = @a> (x, x) }""",
    )
    model = convert(proto)
    assert ops(model) == ["Scores"]
    (found,) = find(model)
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_CONSTANT


def test_functions_that_call_each_other_are_one_clear_error():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = local.A (x, W) }}",
        {"W": ternary(K, N)},
        domains=["local"],
        functions="""<domain: "local", opset_import: ["" : 18, "local" : 1]>
        A (x, w) => (y) { p = MatMul (x, w) \n q = local.B (p, w) \n y = Relu (q) }
        <domain: "local", opset_import: ["" : 18, "local" : 1]>
        B (x, w) => (y) { y = local.A (x, w) }""",
    )
    with pytest.raises(ModelError, match=r"functions of the model cannot be inlined: .*yclic") as raised:
        inline_weight_arguments(ir.from_proto(proto))
    assert "\n" not in str(raised.value)
