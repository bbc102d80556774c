"""Floats of 8 and 4 bits: rounded to the nearest, simulated, stored for DequantizeLinear, or refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary
from written import convert, ops, run

import onnx_bitnet as bn
from onnx_bitnet.errors import ModelError, RecipeError
from onnx_bitnet.quantization.floats import quantize_floats
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import FLOAT_ACTIONS
from onnx_bitnet.report import Reason
from onnx_bitnet.scale_types import TYPES

# Exponent bits, mantissa bits and largest value of each type.
SHAPES = {"fp8e4m3": (4, 3, 448.0), "fp8e5m2": (5, 2, 57344.0), "fp4e2m1": (2, 1, 6.0)}
GRANULARITIES = ("tensor", "channel", "block:16", "block:48")


def values(name: str) -> np.ndarray:
    """Every finite value of a type, from what its name says."""
    exponent_bits, mantissa_bits, largest = SHAPES[name]
    exponent, mantissa = np.meshgrid(np.arange(2**exponent_bits), np.arange(2**mantissa_bits))
    bias = 2 ** (exponent_bits - 1) - 1
    normal = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    subnormal = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    positive = np.where(exponent > 0, normal, subnormal)
    positive = positive[positive <= largest]
    return np.unique(np.concatenate([positive, -positive]))


def of_opset(path: Path, weights: dict[str, np.ndarray], opset: int) -> Path:
    """Save a chain of layers that imports a certain opset."""
    model = onnx.load(chain(path, weights))
    model.opset_import[0].version = opset
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FLOAT_ACTIONS)
def test_each_weight_becomes_the_nearest_value(name, granularity, dtype):
    weight = np.random.default_rng(0).standard_normal((7, 100)).astype(dtype)
    weight[3] = 0
    packed = quantize_floats(weight, LayerSpec(granularity=granularity, float_type=name))
    exact, grid, size = weight.astype(np.float64), values(name), packed.block_size or 100
    spread = np.repeat(packed.scale, size, axis=1)[:, :100].astype(np.float64)
    best = np.abs(exact[..., None] - spread[..., None] * grid).min(axis=-1)
    found = packed.dequantize()
    np.testing.assert_allclose(np.abs(exact - found), best, rtol=1e-4, atol=1e-7)
    assert not found[3].any()
    assert packed.granularity == granularity
    assert packed.zeros == np.mean(found == 0)
    assert not packed.lossless
    noise = np.sum((exact - found) ** 2)
    assert packed.sqnr_db == pytest.approx(10 * np.log10(np.sum(exact**2) / noise))
    largest = np.abs(exact).max(axis=1)[0] if granularity == "channel" else None
    assert largest is None or packed.scale[0, 0] * SHAPES[name][2] >= largest * (1 - 1e-7)


@pytest.mark.parametrize("name", FLOAT_ACTIONS)
def test_values_of_the_type_are_lossless(name):
    weight = (values(name)[None, :] * np.float32(0.25)).astype(np.float32)
    packed = quantize_floats(weight, LayerSpec(granularity="channel", float_type=name))
    assert packed.lossless
    assert packed.sqnr_db is None
    np.testing.assert_array_equal(packed.dequantize(), weight)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_scales_are_rounded_up_to_the_type_asked_for(kind):
    weight = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    spec = LayerSpec(granularity="block:32", float_type="fp4e2m1", scale_type=kind)
    scale = quantize_floats(weight, spec).scale
    np.testing.assert_array_equal(scale.astype(TYPES[kind]).astype(np.float32), scale)
    assert (scale * 6 >= np.abs(weight).reshape(7, 3, 32).max(axis=-1)).all()
    tiny = quantize_floats(1e-6 * weight, spec)
    assert tiny.sqnr_db > 15


def test_weights_that_overflow_are_an_error():
    weight = np.full((1, 16), np.finfo(np.float32).max)
    weight[0, 1] = 1
    with pytest.raises(ModelError, match="near the largest float32 overflow"):
        quantize_floats(weight, LayerSpec(granularity="channel", float_type="fp8e4m3"))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:16"])
@pytest.mark.parametrize("action", ["fp8e4m3", "fp8e5m2"])
def test_stock_ops_compute_what_is_simulated(tmp_path, action, granularity):
    source = of_opset(tmp_path / "in.onnx", {"a": ordinary(K), "b": ordinary(8, seed=1)}, 21)
    rules = [{"match": "*", "action": action, "granularity": granularity}]
    for target in ("ort", "simulate"):
        report = convert(source, tmp_path / f"{target}.onnx", {"target": target, "rules": rules})
        onnx.checker.check_model(tmp_path / f"{target}.onnx")
        assert bn.plan(source, report.recipe).output_bytes == report.output_bytes
    assert ops(tmp_path / "simulate.onnx") == ["MatMul"] * 2
    assert ops(tmp_path / "ort.onnx") == ["DequantizeLinear", "MatMul"] * 2
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "ort.onnx", x), run(tmp_path / "simulate.onnx", x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_report_says_what_a_layer_is(tmp_path):
    source = of_opset(tmp_path / "in.onnx", {"a": ordinary(K)}, 21)
    report = convert(source, tmp_path / "ort.onnx", {"target": "ort", "rules": [("*", "fp8e4m3")]})
    (layer,) = report.layers
    assert (layer.format, layer.granularity, layer.scale_type) == ("fp8e4m3", "channel", "float32")
    assert (layer.activation_bits, layer.packed_bytes) == (32, K * K + 4 * K)
    assert 25 < layer.sqnr_db < 40
    report = convert(source, tmp_path / "s.onnx", {"target": "simulate", "rules": [("*", "fp4e2m1")]})
    assert (report.layers[0].format, report.layers[0].granularity) == ("float32", "block:32")
    assert 15 < report.layers[0].sqnr_db < 25


def test_large_weights_go_to_the_data_file(tmp_path):
    source = of_opset(tmp_path / "in.onnx", {"a": np.tile(ordinary(K), (1, 300)).astype(np.float32)}, 21)
    convert(source, tmp_path / "ort.onnx", {"target": "ort", "rules": [("*", "fp8e5m2")]})
    assert (tmp_path / "ort.onnx.data").exists()
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    assert np.isfinite(run(tmp_path / "ort.onnx", x)[0]).all()


@pytest.mark.parametrize(
    ("opset", "granularity", "kept"), [(17, "channel", 1), (19, "channel", 0), (19, "block:16", 1)]
)
def test_opsets_without_the_op_keep_the_layer_and_say_so(tmp_path, opset, granularity, kept):
    source = of_opset(tmp_path / "in.onnx", {"a": ordinary(K)}, opset)
    rules = [{"match": "*", "action": "fp8e4m3", "granularity": granularity}]
    report = convert(source, tmp_path / "ort.onnx", {"target": "ort", "rules": rules})
    assert [layer.reason for layer in report.kept] == [Reason.OPSET_TOO_OLD] * kept
    assert all(
        f"needs opset {19 if granularity == 'channel' else 21}" in layer.detail for layer in report.kept
    )


def test_activations_and_rotation_are_as_in_a_simulation(tmp_path):
    source = of_opset(tmp_path / "in.onnx", {"a": ordinary(K)}, 21)
    recipe = {"rotation": "hadamard:64", "activation_bits": 8, "rules": [("*", "fp8e4m3")]}
    for target in ("ort", "simulate"):
        convert(source, tmp_path / f"{target}.onnx", recipe | {"target": target})
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    got, want, exact = (run(tmp_path / f"{name}.onnx", x)[0] for name in ("ort", "simulate", "in"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(got - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": [("*", "fp8e4m3")]}, "the packed ops hold no fp8e4m3; use int8"),
        ({"rules": [("*", "fp4e2m1")]}, "the packed ops hold no fp4e2m1"),
        ({"rules": [("*", "fp4e2m1")], "target": "ort"}, "has no CPU kernel for fp4e2m1"),
        ({"rules": [("*", "fp8e5m2")], "target": "ort", "mode": "lossless"}, "changes no value"),
        ({"rules": [{"action": "fp8e5m2", "scale": 1.0}], "target": "ort"}, "scale goes with int4 and int8"),
    ],
)
def test_what_has_no_kernel_is_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        bn.Recipe(**fields)


def test_onnxruntime_has_no_kernel_for_what_is_refused():
    """When this fails, onnxruntime has learned it, and so may we."""
    helper, tensors = onnx.helper, onnx.TensorProto
    weight = helper.make_tensor("w", tensors.FLOAT4E2M1, [2, 2], [1.0, 2.0, 3.0, 4.0])
    scale = helper.make_tensor("s", tensors.FLOAT, [], [1.0])
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    y = helper.make_tensor_value_info("y", tensors.FLOAT, [2, 2])
    graph = helper.make_graph([node], "g", [], [y], [weight, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        run(model.SerializeToString(), {})
