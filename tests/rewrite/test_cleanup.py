"""Cleaning up: float weights that nothing reads go, everything else stays."""

from __future__ import annotations

import numpy as np
from rewrite.graphs import GRAPHS, ROADS, K, N, W, build, numbers, ternary
from rewrite.steps import convert, initializers, ops

PACKED = {"W.i2s", "W.scale", "W.zero_point", f"onnx_bitnet.zeros.{N}"}


def test_float_weight_goes():
    assert initializers(convert(GRAPHS["matmul"].model)).keys() == PACKED


def test_nodes_that_made_the_weight_go():
    for name in ("weight_online_chain", "weight_dq_blocked_int4", "weight_constant_floats", "weight_squeeze"):
        model = convert(ROADS[name].model)
        assert ops(model) == ["MatMulI2S"], name
        left = [key for key in initializers(model) if not key.endswith((".i2s", ".scale", ".zero_point"))]
        assert left == [f"onnx_bitnet.zeros.{N}"], name


def test_embedding_that_is_tied_to_the_weight_stays():
    model = convert(GRAPHS["tied_embedding"].model)
    assert ops(model) == ["Gather", "MatMulI2S"]
    np.testing.assert_array_equal(initializers(model)["W"], ternary(N, K))


def test_weight_that_is_an_output_stays():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {N}] y, float[{N}, {K}] t) {{
            t = Transpose (W)
            y = MatMul (x, W)
        }}""",
        W,
    )
    model = convert(proto)
    assert sorted(ops(model)) == ["MatMulI2S", "Transpose"]
    assert "W" in initializers(model)


def test_weight_that_a_branch_reads_stays():
    proto = build(
        f"""g (bool c, float[b, {K}] x) => (float[b, {N}] y, float[{K}, {N}] z) {{
            y = MatMul (x, W)
            z = If (c) <
                then_branch = t () => (float[{K}, {N}] u) {{ u = Identity (W) }},
                else_branch = e () => (float[{K}, {N}] o) {{ o = Neg (W) }}
            >
        }}""",
        W,
    )
    assert "W" in initializers(convert(proto))


def test_what_was_dead_before_stays():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ d = Relu (unused) \n y = MatMul (x, W) }}",
        W | {"unused": numbers(3), "lonely": numbers(2)},
    )
    model = convert(proto)
    assert ops(model) == ["Relu", "MatMulI2S"]
    assert initializers(model).keys() == PACKED | {"unused", "lonely"}


def test_shared_parameters_of_a_chain_stay_while_another_layer_reads_them():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {N}] y) {{
            w = Mul (W, s)
            p = MatMul (x, w)
            y = Sub (p, s)
        }}""",
        W | {"s": np.float32(2)},
    )
    model = convert(proto)
    assert ops(model) == ["MatMulI2S", "Sub"]
    assert "s" in initializers(model)
    assert "W" not in initializers(model)
