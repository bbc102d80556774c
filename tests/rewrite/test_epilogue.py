"""Factors and addends that follow a layer: what goes into weight and bias, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite.graphs import B, K, N, W, build, numbers
from rewrite.steps import convert, find_one, ops, stock, with_library

from onnx_bitnet.rewrite.records import Linear

SCALES = {"t": np.float32(0.25), "c": np.repeat(np.float32([0.5, 4]), N // 2), "one": np.float32(1)}


def model(nodes: str, **more: np.ndarray):
    return build(f"g (float[2, 3, {K}] x) => (float[2, 3, {N}] y) {{ {nodes} }}", W | B | SCALES | more)


@pytest.mark.parametrize(
    "nodes",
    [
        "p = MatMul (x, W) \n y = Mul (p, t)",
        "p = MatMul (x, W) \n y = Mul (c, p)",
        "p = MatMul (x, W) \n y = Div (p, t)",
        "p = MatMul (x, W) \n q = Div (p, c) \n y = Add (q, B)",
        "p = MatMul (x, W) \n q = Add (p, B) \n y = Mul (q, t)",
        "p = MatMul (x, W) \n q = Mul (p, c) \n r = Div (q, t) \n s = Add (B, r) \n y = Mul (s, t)",
    ],
    ids=["Mul", "per output", "Div", "before bias", "after bias", "many"],
)
def test_becomes_one_op_and_computes_the_same(nodes: str):
    before = model(nodes)
    after = convert(before)
    assert ops(after) == ["MatMulI2S"]
    feeds = {"x": numbers(2, 3, K)}
    wanted = stock(before, feeds)[0]
    np.testing.assert_array_equal(with_library(after, feeds)[0], wanted)
    np.testing.assert_array_equal(stock(after, feeds)[0], wanted)


@pytest.mark.parametrize(
    ("nodes", "stay"),
    [
        ("p = MatMul (x, W) \n y = Div (one, p)", ["Div"]),
        ("p = MatMul (x, W) \n q = Add (p, B) \n y = Mul (q, c)", ["Mul"]),
        ("p = MatMul (x, W) \n y = Mul (p, p)", ["Mul"]),
        ("p = MatMul (x, W) \n y = Mul (p, rows)", ["Mul"]),
        ("p = MatMul (x, W) \n y = Mul (p, zero)", ["Mul"]),
        ("p = MatMul (x, W) \n q = Mul (p, t) \n y = Add (p, q)", ["Mul", "Add"]),
    ],
    ids=["numerator", "per output after bias", "itself", "per row", "zero", "read twice"],
)
def test_what_is_no_factor_of_the_weight_stays(nodes: str, stay: list[str]):
    after = convert(model(nodes, rows=numbers(3, 1), zero=np.float32(0)))
    assert ops(after) == ["MatMulI2S", *stay]


def test_an_expanded_bias_needs_shapes_that_agree():
    nodes = "p = MatMul (x, W) \n e = Expand (B, shape) \n y = Add (p, e)"
    assert ops(convert(model(nodes, shape=np.array([2, 3, N])))) == ["MatMulI2S", "Expand", "Add"]
    text = "s = Shape (x) \n d = Slice (s, from, to) \n shape = Concat <axis = 0> (d, n)"
    nodes = f"{text} \n {nodes}"
    more = {"from": np.array([0]), "to": np.array([2]), "n": np.array([N])}
    assert ops(convert(model(nodes, **more)))[-2:] == ["Expand", "Add"]


def test_weight_is_scaled_by_one_rounding():
    linear = find_one(model("p = MatMul (x, W) \n q = Mul (p, c) \n y = Div (q, t)"))
    assert isinstance(linear, Linear)
    np.testing.assert_array_equal(linear.weight.array(), W["W"].T * SCALES["c"][:, None] / SCALES["t"])
