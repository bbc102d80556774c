"""The activation quantization of BitLinear layers: every spelling becomes one op, what is unlike it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite.bitlinear import SPELLINGS, UNLIKE, Spelling, by_s, layer
from rewrite.graphs import K, build, ternary
from rewrite.steps import Outputs, ops, reference, stock, with_library

import onnx_bitnet as bn
from onnx_bitnet.report import Layer, Report
from onnx_bitnet.rewrite.bfloat16 import widen

TYPES = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}


def activations(model: onnx.ModelProto) -> np.ndarray:
    """Rows of all sizes: nothing, less than the smallest peak, and much."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(2, 5, K)) * np.array([0, 1e-7, 0.01, 1, 300]).reshape(5, 1)
    return x.astype(TYPES[model.graph.input[0].type.tensor_type.elem_type])


def convert(
    model: onnx.ModelProto, folder: Path, recipe: bn.Recipe | None = None
) -> tuple[onnx.ModelProto, Report]:
    onnx.save(model, folder / "in.onnx")
    report = bn.convert(folder / "in.onnx", folder / "out.onnx", recipe)
    return onnx.load(folder / "out.onnx"), report


def float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxruntime can run it."""
    wide = ir.from_proto(model)
    widen(wide)
    proto: onnx.ModelProto = ir.to_proto(wide)
    return proto


def only(report: Report) -> Layer:
    (layer,) = report.layers
    return layer


def distance(got: Outputs, wanted: Outputs) -> float:
    difference = np.abs(got[0].astype(np.float64) - wanted[0].astype(np.float64)).max()
    return float(difference / np.abs(wanted[0].astype(np.float64)).max())


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_becomes_one_op_and_computes_the_same(spelling: Spelling, tmp_path: Path):
    model, report = convert(spelling.model, tmp_path)
    assert ops(model) == ["MatMulI2S"]
    assert (only(report).activation_bits, report.lossless) == (8, True)
    assert (only(report).activations == "folded, equal bit for bit") == spelling.exact
    feeds = {"x": activations(model)}
    wanted, got = stock(float32(spelling.model), feeds), with_library(model, feeds)
    if spelling.exact:
        np.testing.assert_array_equal(got[0], wanted[0])
    assert distance(got, wanted) < spelling.tolerance
    assert distance(stock(model, feeds), wanted) < spelling.tolerance
    assert got[0].dtype == wanted[0].dtype


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name.endswith("bfloat16")])
def test_a_bfloat16_model_becomes_float32_under_the_same_names(name: str, tmp_path: Path):
    before = SPELLINGS[name].model
    model, report = convert(before, tmp_path)
    assert "computes in bfloat16" in report.notes[0]
    for end in (model.graph.input, model.graph.output):
        assert [value.type.tensor_type.elem_type for value in end] == [onnx.TensorProto.FLOAT]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    x = activations(model).astype(ir.DataType.BFLOAT16.numpy())
    wanted = reference(before, {"x": x})
    assert distance(with_library(model, {"x": x.astype(np.float32)}), wanted) < SPELLINGS[name].tolerance


def test_the_report_says_how_the_graph_rounds(tmp_path: Path):
    said = {
        "auto_offline_dynamo_float": "the graph rounds each dequantized activation",
        "bitlinear_float": "the graph scales the products in another order",
        "bitlinear_float16": "the graph rounds the scale of a row to float16",
        "one_division": "the graph rounds the scale of a row in another order",
    }
    for name, why in said.items():
        (tmp_path / name).mkdir()
        _, report = convert(SPELLINGS[name].model, tmp_path / name)
        assert only(report).activations == f"folded, equal within rounding: {why}"
        assert report.notes == (
            f"the activations of 1 layer are quantized in the graph: {only(report).activations}",
        )


@pytest.mark.parametrize(("model", "why"), UNLIKE.values(), ids=UNLIKE)
def test_what_is_not_the_ops_way_stays(model: onnx.ModelProto, why: str, tmp_path: Path):
    after, report = convert(model, tmp_path)
    assert only(report).activations == f"left in the graph: {why}"
    assert "Round" in ops(after)
    feeds = {"x": activations(model)[:, 2:]}  # without the smallest peak, a row of zeros is NaN
    assert distance(with_library(after, feeds), stock(model, feeds)) < 1e-4


def test_integers_of_another_way_are_used_as_they_are(tmp_path: Path):
    """The op takes them with a step of 1, so nothing is rounded."""
    model = by_s("y = Mul (product, step)", tiny=1e-6).model
    after, report = convert(model, tmp_path)
    assert only(report).activations.endswith("; its integers are used as they are")
    assert ops(after)[-2:] == ["MatMulI2S", "Mul"]
    feeds = {"x": activations(model)}
    np.testing.assert_array_equal(with_library(after, feeds)[0], stock(model, feeds)[0])


def test_a_recipe_of_16_bits_leaves_the_graph_as_it_is(tmp_path: Path):
    model = SPELLINGS["auto_offline_dynamo_float"].model
    after, report = convert(model, tmp_path, bn.Recipe(activation_bits=16))
    assert only(report).activations == "left in the graph: the recipe wants 16 bits"
    assert ops(after)[-3:] == ["Div", "Cast", "MatMulI2S"]


def test_layers_share_a_chain_which_stays_until_the_last_is_gone(tmp_path: Path):
    model = layer(
        """magnitude = Abs (x)
        peak = ReduceMax <keepdims = 1> (magnitude, last)
        a = Clip (peak, tiny)
        inverse = Reciprocal (a)
        s = Mul (inverse, L)
        scaled = Mul (x, s)
        rounded = Round (scaled)
        q = Clip (rounded, low, L)
        d = Div (q, s)
        p0 = MatMul (d, W)
        p1 = MatMul (d, V)
        y = Add (p0, p1)""",
        {"V": ternary(K, 6, seed=9)},
    )
    after, _ = convert(model, tmp_path)
    assert ops(after) == ["MatMulI2S", "MatMulI2S", "Add"]
    (tmp_path / "kept").mkdir()
    ordinary = np.random.default_rng(0).normal(size=(K, 6)).astype(np.float32)
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(ordinary, "V"))
    after, report = convert(model, tmp_path / "kept")
    assert len(report.converted) == 1
    assert ops(after)[:9] == ops(model)[:9]


def test_layers_in_a_row_read_what_the_one_before_makes(tmp_path: Path):
    """The second chain begins at a value that the first layer's replacement makes anew."""
    chain = """
        m{i} = Abs (x{i})
        p{i} = ReduceMax <keepdims = 1> (m{i}, last)
        a{i} = Clip (p{i}, tiny)
        r{i} = Reciprocal (a{i})
        s{i} = Mul (r{i}, L)
        t{i} = Mul (x{i}, s{i})
        u{i} = Round (t{i})
        q{i} = Clip (u{i}, low, L)
        d{i} = Div (q{i}, s{i})
        x{j} = MatMul (d{i}, V)"""
    nodes = "x0 = Relu (x)" + "".join(chain.format(i=i, j=i + 1) for i in range(2)) + "\n y = Relu (x2)"
    model = layer(nodes, {"V": ternary(K, K, scale=0.125)}, n=K)
    after, _ = convert(model, tmp_path)
    assert ops(after) == ["Relu", "MatMulI2S", "MatMulI2S", "Relu"]
    feeds = {"x": activations(model)}
    assert distance(with_library(after, feeds), stock(model, feeds)) < 1e-2


def test_only_ternary_bfloat16_weights_are_widened_in_a_float32_graph(tmp_path: Path):
    model = build(
        f"g (float[b, {K}] x) => (float[b, 6] y) {{ w = Cast <to = 1> (W) \n y = MatMul (x, w) }}",
        {"W": ternary(K, 6, dtype=ir.DataType.BFLOAT16.numpy())},
    )
    after, report = convert(model, tmp_path)
    assert ops(after) == ["MatMulI2S"]
    assert not any("bfloat16" in note for note in report.notes)


def test_a_graph_that_looks_like_a_chain_without_end_is_left_quickly(tmp_path: Path):
    """Each product doubles the ways back to x."""
    squares = "".join(f"h{i + 1} = Mul (h{i}, h{i}) \n" for i in range(60))
    model = layer(
        f"""h0 = Add (x, one) \n {squares}
        scaled = Mul (h60, x)
        rounded = Round (scaled)
        y = MatMul (rounded, W)""",
        {},
    )
    after, report = convert(model, tmp_path)
    assert only(report).activations == ""
    assert ops(after) == [*ops(model)[:-1], "MatMulI2S"]
