"""What rounding weights and rounding activations costs, told apart in every form that a layer may have."""

from __future__ import annotations

import csv
import math

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary

import onnx_bitnet as bn
from onnx_bitnet.validation.validation import LayerMetrics, Validation

FEEDS = [{"x": np.random.default_rng(seed).standard_normal((16, K), np.float32)} for seed in range(2)]


@pytest.fixture
def model(tmp_path):
    return chain(tmp_path / "model.onnx", {"a": ordinary(K), "b": ordinary(K, seed=2)})


def parts(model, recipe, data=None) -> dict[str, LayerMetrics]:
    return {layer.name: layer for layer in validated(model, recipe, data).layers}


def validated(model, recipe, data=None) -> Validation:
    bn.convert(model, model.with_name("out.onnx"), recipe, data=data, force=True)
    return bn.validate(model, model.with_name("out.onnx"), FEEDS)


def decibel(layer: LayerMetrics) -> tuple[float, float]:
    assert layer.note == ""
    assert layer.weight.sqnr_db > layer.local.sqnr_db - 0.01
    return layer.weight.sqnr_db, layer.activations.sqnr_db


RECIPES = {
    "int8": {"rules": [("*", "int8")], "activation_bits": 8},
    "int8 by blocks": {"rules": [("*", "int8")], "activation_bits": 8, "granularity": "block:32"},
    "int4": {"rules": [("*", "int4")], "activation_bits": 8},
    "ternary": {"mode": "ternary", "activation_bits": 8},
    "rotated": {"mode": "ternary", "activation_bits": 8, "rotation": "hadamard:32"},
}


@pytest.mark.parametrize("target", ["simulate", "ort"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_target_tells_errors_apart_as_packed_ops_do(model, name, target):
    wanted = parts(model, RECIPES[name])
    got = parts(model, RECIPES[name] | {"target": target})
    assert got.keys() == wanted.keys() == {"layer.a", "layer.b"}
    for layer, want in wanted.items():
        weight, activations = decibel(got[layer])
        assert weight == pytest.approx(decibel(want)[0], abs=0.02)
        # one scale for all of x costs more, one for each block of a row less
        dynamic = target == "ort" and name == "int8"
        by_block = target == "ort" and not dynamic
        assert -(4 if dynamic else 1) < activations - decibel(want)[1] < (4 if by_block else 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("method", ["dynamic", "minmax"])
def test_simulated_steps_of_both_kinds_are_left_out(model, bits, method):
    recipe = {"rules": [("*", "int8")], "activation_bits": bits, "activation_scale": method}
    data = FEEDS if method == "minmax" else None
    wanted, got = (parts(model, recipe | {"target": target}, data) for target in ("custom", "simulate"))
    for layer, want in wanted.items():
        assert decibel(got[layer]) == pytest.approx(decibel(want), abs=0.1)


def test_a_restored_model_is_measured_as_the_packed_one(model, tmp_path):
    wanted = parts(model, RECIPES["rotated"])
    bn.convert(tmp_path / "out.onnx", tmp_path / "float.onnx", {"target": "float"})
    result = bn.validate(model, tmp_path / "float.onnx", FEEDS)
    assert result.floats == ()
    for layer in result.layers:
        assert decibel(layer) == pytest.approx(decibel(wanted[layer.name]), abs=0.1)


def half(path) -> None:
    """Make a model's values float16."""
    found = onnx.load(path)
    for tensor in found.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*found.graph.input, *found.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(found, path)


@pytest.mark.parametrize("target", ["simulate", "ort"])
@pytest.mark.parametrize("name", ["int8", "int8 by blocks"])
def test_float16_and_a_bias(tmp_path, name, target):
    path = tmp_path / "model.onnx"
    chain(path, {"a": ordinary(K)})
    found = onnx.load(path)
    found.graph.node[0].CopyFrom(onnx.helper.make_node("Gemm", ["x", "a", "c"], ["a.y"], name="layer.a"))
    found.graph.initializer.append(onnx.numpy_helper.from_array(ordinary(K, 1)[0], "c"))
    onnx.save(found, path)
    half(path)
    feeds = [{"x": batch["x"].astype(np.float16)} for batch in FEEDS]
    layers = []
    for form in ("custom", target):
        bn.convert(path, tmp_path / "out.onnx", RECIPES[name] | {"target": form}, force=True)
        layers += bn.validate(path, tmp_path / "out.onnx", feeds).layers
    want, got = map(decibel, layers)
    assert got == pytest.approx(want, abs=4)
    assert got[0] == pytest.approx(want[0], abs=0.1)


@pytest.mark.parametrize("target", ["custom", "simulate", "ort"])
@pytest.mark.parametrize("name", ["int8", "int4", "ternary"])
def test_what_rounds_no_activations_is_identical(model, name, target):
    recipe = RECIPES[name] | {"activation_bits": 32, "target": target}
    for layer in parts(model, recipe).values():
        assert layer.activations.identical
        assert layer.weight == layer.local


def test_layers_of_other_targets_are_blamed_alike(model):
    blamed = [
        {name: layer.blame for name, layer in parts(model, RECIPES["int4"] | {"target": target}).items()}
        for target in ("custom", "simulate", "ort")
    ]
    for blames in blamed:
        assert math.fsum(blames.values()) == pytest.approx(1)
        assert blames == pytest.approx(blamed[0], abs=0.02)


def rounded_otherwise(path) -> None:
    """Put a Clip in the place of the Min and the Max behind each Round."""
    found = onnx.load(path)
    made_by = {node.output[0]: node for node in found.graph.node}
    for node in found.graph.node:
        least = made_by.get(node.input[0])
        if node.op_type == "Max" and least is not None and least.op_type == "Min":
            node.op_type = "Clip"
            node.input[:] = [least.input[0], node.input[1], least.input[1]]
    onnx.save(found, path)


def test_what_cannot_be_separated_is_said(model, tmp_path):
    bn.convert(model, tmp_path / "out.onnx", RECIPES["int8"] | {"target": "simulate"})
    whole = bn.validate(model, tmp_path / "out.onnx", FEEDS)
    rounded_otherwise(tmp_path / "out.onnx")
    result = bn.validate(model, tmp_path / "out.onnx", FEEDS)
    for layer, known in zip(result.layers, whole.layers, strict=True):
        assert layer.note.startswith("not separated: ")
        assert (layer.weight, layer.activations) == (None, None)
        assert layer.local.sqnr_db == pytest.approx(known.local.sqnr_db)
        assert layer.blame == pytest.approx(known.blame)
    result.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<td>–</td><td>–</td><td>") == 2
    assert "identical" not in page.partition("<script>")[0]
    result.to_csv(tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert (row["weight_sqnr_db"], row["activations_sqnr_db"]) == ("", "")
            assert row["note"].startswith("not separated")


@pytest.mark.parametrize("target", ["custom", "simulate", "ort"])
def test_the_page_has_one_line_for_each_layer_of_any_target(model, target):
    result = validated(model, RECIPES["int4"] | {"target": target, "rules": [("*b", "keep"), ("*", "int4")]})
    result.to_html(model.with_name("report.html"))
    page = model.with_name("report.html").read_text("utf-8")
    assert (page.count("<tr><td>layer.a</td>"), page.count(">layer.b</td>")) == (1, 1)
    assert "1 of 2 linear layers" in page
    assert [left.name for left in result.floats] == ["layer.b"]
