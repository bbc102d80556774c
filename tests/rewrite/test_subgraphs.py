"""Layers in the bodies of If, Loop and Scan."""

from __future__ import annotations

import onnx
from rewrite.graphs import SUBGRAPHS, K, N, build, ternary
from rewrite.steps import convert, find, initializers

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Linear, Refusal


def body(model: onnx.ModelProto, node: int, attribute: str) -> onnx.GraphProto:
    return next(a.g for a in model.graph.node[node].attribute if a.name == attribute)


def test_place_is_told():
    places = {name: [layer.where for layer in find(case.model)] for name, case in SUBGRAPHS.items()}
    assert places == {
        "if_inner_weight": ["node y / then_branch", "node y / else_branch"],
        "if_outer_weight_twice": ["", "node y / then_branch"],
        "loop": ["node y / body"],
        "scan": ["node y / body"],
    }


def test_each_body_has_its_packed_weight_itself():
    # older onnxruntimes give a custom op the initializers of its own graph alone as constants
    model = convert(SUBGRAPHS["if_outer_weight_twice"].model)
    assert {"W.i2s", "W.scale", "W.zero_point"} < initializers(model).keys()
    inner = body(model, 1, "then_branch")
    assert [node.op_type for node in inner.node] == ["MatMulI2S"]
    assert {"W.i2s_2", "B.bias"} < {tensor.name for tensor in inner.initializer}
    assert set(inner.node[0].input[1:]) == {tensor.name for tensor in inner.initializer}


def test_float_weights_go_from_both_graphs():
    model = convert(SUBGRAPHS["if_inner_weight"].model)
    inner = body(model, 0, "then_branch")
    zeros = f"onnx_bitnet.zeros.{N}"
    assert sorted(tensor.name for tensor in inner.initializer) == [zeros, "v.i2s", "v.scale", "v.zero_point"]
    assert [node.op_type for node in inner.node] == ["MatMulI2S"]
    assert not initializers(model)


def test_weight_that_is_computed_inside_from_outside_is_found():
    proto = build(
        f"""g (float[3, {K}] x) => (float[3, {K}] y) {{
            y = Scan <num_scan_inputs = 1, body = body (float[{K}] row) => (float[{K}] out) {{
                w = Transpose (W)
                out = MatMul (row, w)
            }}> (x)
        }}""",
        {"W": ternary(K, K)},
    )
    model = convert(proto)
    inner = body(model, 0, "body")
    assert [node.op_type for node in inner.node] == ["MatMulI2S"]
    assert "W.i2s" in {tensor.name for tensor in inner.initializer}


def test_loop_state_is_not_constant():
    proto = build(
        f"""g (float[{K}, {K}] x) => (float[{K}, {K}] y) {{
            y, v = Loop (trips, yes, x, W) <
                body = body (int64 i, bool go, float[{K}, {K}] h, float[{K}, {K}] w)
                    => (bool on, float[{K}, {K}] out, float[{K}, {K}] w_out) {{
                    on = Identity (go)
                    out = MatMul (h, w)
                    w_out = Identity (w)
                }}
            >
        }}""",
        {"W": ternary(K, K)},
    )
    (found,) = find(proto)
    assert isinstance(found, Refusal)
    assert (found.reason, found.detail) == (Reason.WEIGHT_NOT_CONSTANT, "'h' is an input")


def test_nested_bodies_are_searched():
    proto = build(
        f"""g (bool c, float[b, {K}] x) => (float[b, {K}] y) {{
            [outer] y = If (c) <
                then_branch = t () => (float[b, {K}] u) {{
                    [inner] u = If (c) <
                        then_branch = a () => (float[b, {K}] v) {{ v = MatMul (x, W) }},
                        else_branch = d () => (float[b, {K}] w) {{ w = Identity (x) }}
                    >
                }},
                else_branch = e () => (float[b, {K}] o) {{ o = Identity (x) }}
            >
        }}""",
        {"W": ternary(K, K)},
    )
    (found,) = find(proto)
    assert isinstance(found, Linear)
    assert found.where == "node outer / then_branch / node inner / then_branch"
    onnx.checker.check_model(convert(proto), full_check=True)


def test_values_of_one_name_are_not_taken_for_each_other():
    proto = build(
        f"""g (float[3, {K}] x) => (float[3, {K}] y) {{
            turned = Transpose (W)
            y = Scan <num_scan_inputs = 1, body = body (float[{K}] row) => (float[{K}] out)
                <float[1] W = {{2}}>
            {{
                w = Mul (turned, W)
                out = MatMul (row, w)
            }}> (x)
        }}""",
        {"W": ternary(K, K)},
    )
    (found,) = find(proto)
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_EVALUATED
    assert found.detail == "'w': two of the values that it is computed from have one name"
