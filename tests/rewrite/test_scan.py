"""What scan finds: names, order, places, and refusals from the closed list."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from rewrite.graphs import GRAPHS, K, N, W, build, numbers, ternary
from rewrite.steps import convert, find, find_one

from onnx_bitnet.errors import ModelError
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Linear, Refusal

DENSE = f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = MatMul (x, W) }}"


def test_names_are_those_of_nodes_or_else_of_outputs_and_unique():
    found = find(GRAPHS["names_duplicate_and_empty"].model)
    assert [layer.name for layer in found] == ["same", "same_2", "y"]


def test_suffix_avoids_names_that_exist():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            [a] p = MatMul (x, W)
            [a] q = MatMul (p, W)
            [a_2] y = MatMul (q, W)
        }}""",
        {"W": ternary(K, K)},
    )
    assert [layer.name for layer in find(proto)] == ["a", "a_3", "a_2"]


def test_candidates_come_in_graph_order_with_refusals_between():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            a = MatMul (x, W)
            t = Transpose (a)
            b = MatMul (t, a)
            c = Relu (b)
            y = MatMul (c, W)
        }}""",
        {"W": ternary(K, K)},
    )
    assert [(layer.name, type(layer)) for layer in find(proto)] == [
        ("a", Linear),
        ("b", Refusal),
        ("y", Linear),
    ]


def test_product_of_constants_is_part_of_the_weight():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ w = MatMul (A, B) \n y = MatMul (x, w) }}",
        {"A": np.eye(K, dtype=np.float32), "B": ternary(K, N)},
    )
    (linear,) = find(proto)
    assert isinstance(linear, Linear)
    np.testing.assert_array_equal(linear.weight.array(), ternary(K, N).T)


def test_overridable_weight_is_refused():
    text = DENSE.replace(" x)", f" x, float[{K}, {N}] W)")
    found = find_one(build(text, W))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_OVERRIDABLE
    assert found.detail == "initializer 'W' is also a graph input; remove it from the inputs"
    # also behind something that rearranges it
    found = find_one(build(text.replace("y = MatMul (x, W)", "w = Identity (W) \n y = MatMul (x, w)"), W))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_OVERRIDABLE


def test_in_ir_version_3_the_weight_stops_being_an_input():
    model = convert(GRAPHS["overridable_in_ir_3"].model)
    assert [value.name for value in model.graph.input] == ["x"]
    assert model.ir_version == 8


@pytest.mark.parametrize(
    ("opset", "dtype", "reason", "detail"),
    [
        (10, "float", Reason.OPSET_TOO_OLD, "opset 10; FLOAT needs 11 or newer"),
        (14, "float16", Reason.OPSET_TOO_OLD, "opset 14; FLOAT16 needs 15 or newer"),
        (27, "float", Reason.OPSET_TOO_NEW, "opset 27; 26 is the newest known"),
        (18, "double", Reason.ACTIVATION_TYPE, "'x' is DOUBLE"),
        (18, "bfloat16", Reason.ACTIVATION_TYPE, "'x' is BFLOAT16"),
        (18, "int32", Reason.WEIGHT_TYPE, "weight 'W' is INT32"),
    ],
)
def test_types_and_opsets_without_an_op_are_refused(opset: int, dtype: str, reason: Reason, detail: str):
    kinds = {"float": 1, "float16": 10, "double": 11, "bfloat16": 16, "int32": 6}
    weight = onnx.helper.make_tensor("", kinds[dtype], (K, N), ternary(K, N, scale=1).reshape(-1).tolist())
    found = find_one(build(DENSE.replace("float[", f"{dtype}["), {"W": weight}, opset=opset))
    assert isinstance(found, Refusal)
    assert (found.reason, found.detail) == (reason, detail)
    assert (found.n, found.k) == (N, K)


def test_type_that_the_model_does_not_state_is_that_of_the_weight():
    proto = build(DENSE.replace("y = MatMul (x, W)", "h = Relu (x) \n y = MatMul (h, W)"), W)
    (linear,) = find(proto)
    assert isinstance(linear, Linear)
    assert linear.x.dtype is None
    assert linear.dtype.name == "FLOAT"


@pytest.mark.parametrize(
    "node",
    [
        "MatMulInteger (x, W)",
        "ConvInteger (x, W)",
        "QLinearMatMul (x, s, z, W, s, z, s, z)",
        "QLinearConv (x, s, z, W, s, z, s, z)",
        "com.microsoft.DynamicQuantizeMatMul (x, W, s)",
        "com.microsoft.MatMulNBits <K = 12, N = 6, bits = 4, block_size = 16> (x, W, s)",
    ],
)
def test_integer_products_are_refused(node: str):
    proto = build(
        f"g (uint8[2, {K}] x) => (int32[] y) {{ y = {node} }}",
        {"W": np.ones((K, N), np.uint8), "s": np.float32(1), "z": np.uint8(0)},
        domains=["com.microsoft"],
    )
    found = find_one(proto)
    assert isinstance(found, Refusal)
    assert found.reason is Reason.ALREADY_QUANTIZED


def test_missing_operand_is_one_clear_error():
    proto = build(DENSE, W)
    del proto.graph.node[0].input[1]
    with pytest.raises(ModelError, match="'y': MatMul lacks an input; the model is not valid"):
        find(proto)


def test_same_names_of_other_domains_are_no_candidates():
    proto = build(DENSE.replace("= MatMul", "= other.MatMul"), W, domains=["other"])
    assert find(proto) == ()


def test_cycle_in_a_malformed_graph_ends():
    proto = build(
        DENSE.replace("y = MatMul (x, W)", "a = Identity (x) \n b = Identity (a) \n y = MatMul (x, b)")
    )
    proto.graph.node[0].input[0] = "b"
    found = find_one(proto)
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_CONSTANT


def test_scanning_reads_no_weight(monkeypatch: pytest.MonkeyPatch):
    import onnx_ir as ir

    sizes: list[int] = []
    read = ir.serde.TensorProtoTensor.numpy

    def spy(self: ir.serde.TensorProtoTensor) -> np.ndarray:
        sizes.append(self.size)
        return read(self)

    monkeypatch.setattr(ir.serde.TensorProtoTensor, "numpy", spy)
    for name in (
        "matmul_add",
        "gemm_factors",
        "conv_2d",
        "einsum_heads_out",
        "weight_reshape",
        "weight_cast",
    ):
        find(GRAPHS[name].model)
    assert max(sizes) <= 2, "only shapes may be read"


def test_report_of_bias_and_place():
    proto = build(
        DENSE.replace("y = MatMul (x, W)", "p = MatMul (x, W) \n y = Add (p, B)"), W | {"B": numbers(N)}
    )
    linear = find_one(proto)
    assert isinstance(linear, Linear)
    assert linear.bias is not None
    assert (linear.y.name, linear.bias.name, linear.where) == ("y", "B", "")
