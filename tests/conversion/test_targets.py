"""Targets: the same weights in stock ops, simulated in float, and restored, whatever the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary, ternary
from rewrite.graphs import GRAPHS
from rewrite.steps import expected
from written import convert, ops, run

import onnx_bitnet as bn
from onnx_bitnet import files, reference
from onnx_bitnet.errors import ModelError
from onnx_bitnet.quantization import nbits
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.replaced import replaced


@pytest.mark.parametrize("target", ["ort", "simulate"])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_lossless_model_computes_the_same_values(tmp_path, name, target):
    case = GRAPHS[name]
    onnx.save(case.model, tmp_path / "in.onnx")
    report = convert(tmp_path / "in.onnx", tmp_path / "out.onnx", {"target": target, "activation_bits": 32})
    assert len(report.converted) == case.converted
    onnx.checker.check_model(tmp_path / "out.onnx")
    assert not any(node_domain == "onnx_bitnet" for node_domain in domains(tmp_path / "out.onnx"))
    for got, want in zip(run(tmp_path / "out.onnx", case.feeds), expected(case), strict=True):
        np.testing.assert_array_equal(got, want)


def domains(path) -> set[str]:
    return {item.domain for item in onnx.load(path).opset_import}


@pytest.mark.parametrize("name", list(GRAPHS))
def test_float_undoes_custom_and_equals_simulate(tmp_path, name):
    case = GRAPHS[name]
    onnx.save(case.model, tmp_path / "in.onnx")
    bn.convert(tmp_path / "in.onnx", tmp_path / "packed.onnx")
    report = convert(tmp_path / "packed.onnx", tmp_path / "float.onnx", {"target": "float"})
    bn.convert(tmp_path / "in.onnx", tmp_path / "simulated.onnx", {"target": "simulate"})
    assert len(report.converted) == case.converted
    assert not onnx.load(tmp_path / "float.onnx").functions or "function" in name
    for wanted in (run(tmp_path / "simulated.onnx", case.feeds), expected(case)):
        for got, want in zip(run(tmp_path / "float.onnx", case.feeds), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


RECIPES = {
    "ternary": {"mode": "ternary"},
    "two planes": {"mode": "ternary", "planes": 2},
    "four levels": {"mode": "ternary", "levels": 4, "granularity": "block:32"},
    "int4": {"rules": [("*", "int4")]},
    "int8": {"rules": [("*", "int8")]},
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("bits", ["auto", 8, 16, 32])
@pytest.mark.parametrize("name", list(RECIPES))
def test_float_of_custom_is_simulate(mixed, tmp_path, name, bits, with_data):
    """With data, too: layers are rounded by what those before them give, which is no matter of the target."""
    generator = np.random.default_rng(1)
    feeds = [{"x": generator.standard_normal((24, K), np.float32)} for _ in range(2)]
    data = feeds if with_data else None
    bn.convert(mixed, tmp_path / "packed.onnx", RECIPES[name] | {"activation_bits": bits}, data=data)
    restored = {"target": "float", "activation_bits": bits}
    bn.convert(tmp_path / "packed.onnx", tmp_path / "float.onnx", restored)
    simulated = RECIPES[name] | {"target": "simulate", "activation_bits": bits}
    bn.convert(mixed, tmp_path / "simulated.onnx", simulated, data=data)
    float_model, simulation = (
        sorted(
            tensor.tobytes() for tensor in map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
        )
        for path in (tmp_path / "float.onnx", tmp_path / "simulated.onnx")
    )
    assert float_model == simulation
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "float.onnx", x), run(tmp_path / "simulated.onnx", x)
    np.testing.assert_array_equal(got, want)
    if bits in ("auto", 32) and not with_data:
        assert ops(tmp_path / "float.onnx") == ["MatMul"] * 3


def test_stock_codes_are_those_of_packed_ops_with_data(mixed, tmp_path):
    generator = np.random.default_rng(1)
    feeds = [{"x": generator.standard_normal((24, K), np.float32)} for _ in range(2)]
    recipe = {"rules": [("*", "int8")], "granularity": "channel", "activation_bits": 8}
    weights = []
    for target in ("custom", "ort"):
        bn.convert(mixed, tmp_path / f"{target}.onnx", recipe | {"target": target}, data=feeds)
        found = replaced(files.read(tmp_path / f"{target}.onnx").model)
        weights.append({node.layer: node.decoder()(slice(None)) for node in found})
    assert weights[0].keys() == weights[1].keys()
    for layer, weight in weights[0].items():
        np.testing.assert_array_equal(weights[1][layer].reshape(weight.shape), weight)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_scale_types_are_rounded_alike_for_all_targets(mixed, tmp_path, name):
    rule = {"match": "layer.b", "action": "int4", "scale_type": name, "granularity": "block:32"}
    recipe = {"mode": "ternary", "rules": [rule], "activation_bits": 32}
    stored = {}
    for target in ("custom", "ort", "simulate"):
        report = convert(mixed, tmp_path / f"{target}.onnx", recipe | {"target": target})
        assert bn.plan(mixed, recipe | {"target": target}).output_bytes == report.output_bytes
        stored[target] = report.layers[1].scale_type
    wanted = "float32" if name == "float32" else "float16"
    assert stored == {"custom": wanted, "ort": "float32", "simulate": ""}
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    want, *others = (run(tmp_path / f"{target}.onnx", x)[0] for target in ("simulate", "custom", "ort"))
    for got in others:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [{}, {"action": "int4"}], ids=["ternary", "int4"])
def test_blocks_of_several_outputs_go_to_all_targets(mixed, tmp_path, rule):
    rule = {"match": "layer.b", "mode": "ternary", "granularity": "block:2x16", **rule}
    for target in ("custom", "ort", "simulate"):
        recipe = {"rules": [rule], "activation_bits": 32, "target": target}
        report = convert(mixed, tmp_path / f"{target}.onnx", recipe)
        assert bn.plan(mixed, recipe).output_bytes == report.output_bytes
        assert report.layers[1].granularity == "block:2x16"
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    want, *others = (run(tmp_path / f"{target}.onnx", x)[0] for target in ("simulate", "custom", "ort"))
    for got in others:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_simulated_ternary_weights_are_packed_without_loss(mixed, tmp_path):
    recipe = {"mode": "ternary", "granularity": "block:32"}
    bn.convert(mixed, tmp_path / "simulated.onnx", recipe | {"target": "simulate"})
    report = bn.convert(tmp_path / "simulated.onnx", tmp_path / "packed.onnx")
    assert report.lossless
    assert len(report.converted) == 3
    bn.convert(mixed, tmp_path / "direct.onnx", recipe)
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = (bn.session(tmp_path / f"{name}.onnx").run(None, x) for name in ("packed", "direct"))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [8, 16])
def test_simulated_activations_are_those_of_the_packed_op(mixed, tmp_path, bits):
    recipe = {"mode": "ternary", "granularity": "channel", "activation_bits": bits}
    bn.convert(mixed, tmp_path / "packed.onnx", recipe)
    bn.convert(mixed, tmp_path / "simulated.onnx", recipe | {"target": "simulate"})
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "simulated.onnx", x), bn.session(tmp_path / "packed.onnx").run(None, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "kept"),
    [
        ("ternary", "nbits2", []),
        ("four levels", "nbits2", []),
        ("int4", "nbits4", []),
        ("int8", "nbits8", []),
        ("two planes", "nbits2", ["layer.b"]),
    ],
)
def test_stock_ops_hold_the_same_weights(mixed, tmp_path, name, form, kept):
    report = convert(mixed, tmp_path / "ort.onnx", RECIPES[name] | {"target": "ort", "activation_bits": 16})
    assert {layer.format for layer in report.converted} == {form}
    assert [(layer.name, layer.reason) for layer in report.kept] == [
        (name, Reason.NO_STOCK_OP) for name in kept
    ]
    assert ops(tmp_path / "ort.onnx").count("MatMulNBits") == 3 - len(kept)
    rules = [*({"match": name, "keep": True} for name in kept), *RECIPES[name].get("rules", ())]
    bn.convert(mixed, tmp_path / "simulated.onnx", RECIPES[name] | {"target": "simulate", "rules": rules})
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "ort.onnx", x), run(tmp_path / "simulated.onnx", x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    levels = {
        attribute.i
        for node in onnx.load(tmp_path / "ort.onnx").graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {1}


def test_stock_activations_are_int8_unless_more_is_asked_for(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "ort.onnx", {"target": "ort"})
    assert {layer.activation_bits for layer in report.converted} == {8}
    node = onnx.load(tmp_path / "ort.onnx").graph.node[0]
    assert next(item.i for item in node.attribute if item.name == "accuracy_level") == 4
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "ort.onnx", x), run(mixed, x)
    assert 0 < np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_int8_weights_that_meet_int8_activations_are_a_dynamic_product(mixed, tmp_path):
    recipe = {"rules": [("*", "int8")], "target": "ort", "activation_bits": 8}
    report = convert(mixed, tmp_path / "ort.onnx", recipe)
    assert {layer.format for layer in report.layers} == {"int8"}
    assert ops(tmp_path / "ort.onnx") == ["DynamicQuantizeMatMul"] * 3
    x = {"x": np.random.default_rng(0).standard_normal((3, K), np.float32)}
    (got,), (want,) = run(tmp_path / "ort.onnx", x), run(mixed, x)
    assert np.linalg.norm(got - want) < 0.04 * np.linalg.norm(want)


def test_layers_of_other_targets_are_validated_too(mixed, tmp_path):
    for target in ("ort", "simulate"):
        bn.convert(mixed, tmp_path / f"{target}.onnx", {"mode": "ternary", "target": target})
        result = bn.validate(mixed, tmp_path / f"{target}.onnx")
        assert {layer.name for layer in result.layers} == {"layer.a", "layer.b", "layer.c"}
        assert all(layer.local is not None for layer in result.layers)


def test_tied_weights_are_stored_once(tmp_path):
    model = onnx.load(chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ternary(K)}))
    model.graph.node[1].input[1] = "a"
    onnx.save(model, tmp_path / "tied.onnx")
    bn.convert(tmp_path / "tied.onnx", tmp_path / "packed.onnx")
    for source, target, count in (("tied", "ort", 2), ("tied", "simulate", 1), ("packed", "float", 1)):
        report = bn.convert(tmp_path / f"{source}.onnx", tmp_path / f"{target}.onnx", {"target": target})
        assert [layer.shared_with for layer in report.layers] == [None, "layer.a"]
        names = [tensor.name for tensor in onnx.load(tmp_path / f"{target}.onnx").graph.initializer]
        assert sum(name.startswith("a.") for name in names) == count


def test_damaged_codes_are_not_restored(mixed, tmp_path):
    bn.convert(mixed, tmp_path / "packed.onnx", {"format": "t5"})
    model = onnx.load(tmp_path / "packed.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8)
    weight.raw_data = b"\xff" + weight.raw_data[1:]
    onnx.save(model, tmp_path / "packed.onnx")
    with pytest.raises(ModelError, match=r"packed node 'layer.a': weight: a byte is above 242"):
        bn.convert(tmp_path / "packed.onnx", tmp_path / "float.onnx", {"target": "float"})
    assert not (tmp_path / "float.onnx").exists()


def test_nothing_to_restore_is_said(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"target": "float"})
    assert report.layers == ()
    assert report.notes == ("nothing was restored: the model has no packed layers",)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 128])
def test_packed_integers_decode_by_the_oracle(bits, block_size):
    generator = np.random.default_rng(bits)
    q = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), (5, 200)).astype(np.int8)
    scale = generator.standard_normal((5, -(-200 // block_size)), np.float32)
    packed = nbits.NBits.pack(nbits.Integers(q, scale, block_size, bits))
    expected = q * np.repeat(scale, block_size, axis=1)[:, :200]
    np.testing.assert_array_equal(
        reference.dequantize_nbits(packed.weight, packed.scale, bits, 200), expected
    )
    np.testing.assert_array_equal(packed.dequantize(slice(1, 3)), expected[1:3])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:48", "block:256"])
def test_any_granularity_finds_its_block(granularity):
    weight = np.ascontiguousarray(ordinary(8, 600).T)
    quantized = bn.quantize(weight, {"mode": "ternary", "granularity": granularity})
    packed = nbits.NBits.pack(nbits.integers(quantized))
    assert packed.block_size == {"block:48": 16}.get(granularity, 128)
    np.testing.assert_array_equal(packed.dequantize(), quantized.dequantize())


def test_planes_in_no_integer_ratio_are_no_integers():
    weight = np.ascontiguousarray(ordinary(8, 64).T)
    quantized = bn.quantize(weight, {"mode": "ternary", "planes": 2})
    assert nbits.integers(quantized) is None


def test_rounding_by_data_and_rotation_are_the_same_in_every_target(mixed, tmp_path):
    data = [{"x": np.random.default_rng(0).standard_normal((32, K), np.float32)}]
    recipe = {"mode": "ternary", "rotation": "hadamard:32", "activation_bits": 32, "granularity": "block:32"}
    for target in ("custom", "simulate", "ort"):
        bn.convert(mixed, tmp_path / f"{target}.onnx", recipe | {"target": target}, data=data)
    bn.convert(tmp_path / "custom.onnx", tmp_path / "float.onnx", {"target": "float"})
    (want,) = bn.session(tmp_path / "custom.onnx").run(None, data[0])
    for target in ("simulate", "ort", "float"):
        assert domains(tmp_path / f"{target}.onnx") <= {"", "com.microsoft"}
        (got,) = run(tmp_path / f"{target}.onnx", data[0])
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
