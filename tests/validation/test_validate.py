"""Validate: outputs and layers of two models against plain NumPy, and each way it can go wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_bitnet as bn
from onnx_bitnet.errors import DataError, ModelError
from onnx_bitnet.rewrite.functions import DOMAIN, FUNCTIONS
from onnx_bitnet.validation.metrics import Accumulator, Metrics
from onnx_bitnet.validation.validate import load_metric, validate
from onnx_bitnet.validation.validation import OutputMetrics, Validation

OPSET = 17
K = 8
RNG = np.random.default_rng(0)
CODES = [RNG.integers(0, 3, (K, K)).astype(np.uint8) for _ in range(2)]  # (N, K)
SCALE = 0.25
NOISE = [0.05 * RNG.standard_normal((K, K)).astype(np.float32) for _ in range(2)]
TERNARY = [SCALE * (codes.astype(np.float32) - 1) for codes in CODES]
FLOAT = [weight + noise for weight, noise in zip(TERNARY, NOISE, strict=True)]
BIAS = RNG.standard_normal(K).astype(np.float32)


def value(
    name: str, shape: Sequence[int | str] = ("n", K), kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    *,
    external: bool = False,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        list(inputs) or [value("x")],
        list(outputs) or [value("y")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    if any(node.domain == DOMAIN for node in _all_nodes(graph)):
        model.functions.append(ir.to_proto(FUNCTIONS["MatMulI2S"](OPSET)))
    onnx.save(model, path, save_as_external_data=external, location=path.name + ".data", size_threshold=0)
    return path


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g)


def tagged(node: onnx.NodeProto, layer: str, **more: str) -> onnx.NodeProto:
    for key, text in ({"layer": layer} | more).items():
        node.metadata_props.add(key=f"{DOMAIN}.{key}", value=text)
    return node


def packed_node(x: str, y: str, index: int, bias: str, tags: dict[str, str]) -> onnx.NodeProto:
    node = helper.make_node(
        "MatMulI2S",
        [x, f"w{index}.i2s", "scale", "zero_point", bias],
        [y],
        domain=DOMAIN,
        K=K,
        N=K,
        block_size=0,
        activation_bits=32,
        activation_scale=0.0,
    )
    return tagged(node, **tags) if tags else node


def constants() -> dict[str, np.ndarray]:
    weights = {
        f"w{index}.i2s": np.bitwise_or.reduce(
            codes.reshape(1, K, K // 4, 4) << np.array([0, 2, 4, 6], np.uint8), axis=-1
        )
        for index, codes in enumerate(CODES)
    }
    one = np.ones((1, 1, 1), np.float32)
    return weights | {
        "scale": SCALE * one,
        "zero_point": one,
        "zeros": np.zeros(K, np.float32),
        "bias": BIAS,
    }


def float_model(path: Path, *, external: bool = False) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w1", "bias"], ["c"], name="second", transB=1),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    arrays = {"w0": np.ascontiguousarray(FLOAT[0].T), "w1": FLOAT[1], "bias": BIAS}
    return save(path, nodes, arrays, external=external)


def packed_model(path: Path, *, external: bool = False) -> Path:
    nodes = [
        packed_node("x", "a", 0, "zeros", {"layer": "first", "x": "x", "y": "a"}),
        helper.make_node("Relu", ["a"], ["b"]),
        packed_node("b", "c", 1, "bias", {"layer": "second", "x": "b", "y": "c"}),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    return save(path, nodes, constants(), external=external)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return float_model(tmp_path / "float.onnx"), packed_model(tmp_path / "packed.onnx")


BATCHES = [{"x": RNG.standard_normal((rows, K)).astype(np.float32)} for rows in (3, 5)]


def run(x: np.ndarray, weights: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = x @ weights[0].T
    b = np.maximum(a, 0)
    return a, b, b @ weights[1].T + BIAS


def expected(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Metrics:
    accumulator = Accumulator()
    for reference, got in pairs:
        accumulator.update(reference, got)
    return accumulator.result()


def assert_close(got: Metrics | None, want: Metrics) -> None:
    """Layers are not compared as scores of classes: they have neither top1 nor KL."""
    assert got is not None
    unscored = ("top1", "kl") if got.top1 is None else ()
    for name, number in want.to_dict().items():
        if name in unscored:
            continue
        close = number if number is None else pytest.approx(number, rel=1e-4)
        assert got.to_dict()[name] == close, name


def check_numbers(result: Validation) -> None:
    """The result of the pair of models on BATCHES, against NumPy."""
    references = [run(batch["x"], FLOAT) for batch in BATCHES]
    gots = [run(batch["x"], TERNARY) for batch in BATCHES]
    accumulated = {
        "first": expected([(r[0], g[0]) for r, g in zip(references, gots, strict=True)]),
        "second": expected([(r[2], g[2]) for r, g in zip(references, gots, strict=True)]),
    }
    local = {
        "first": accumulated["first"],
        "second": expected([(c, b @ TERNARY[1].T + BIAS) for _, b, c in references]),
    }
    assert result.batches == 2
    assert [output.name for output in result.outputs] == ["y"]
    assert_close(result.outputs[0].metrics, accumulated["second"])
    assert {layer.name for layer in result.layers} == {"first", "second"}
    for layer in result.layers:
        assert layer.note == ""
        assert_close(layer.accumulated, accumulated[layer.name])
        assert_close(layer.local, local[layer.name])
    sqnr = [layer.local.sqnr_db for layer in result.layers if layer.local]
    assert sqnr == sorted(sqnr)


def test_outputs_and_layers_equal_numpy(pair):
    result = validate(*pair, BATCHES)
    check_numbers(result)
    assert not result.random_data
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["schema"] == "onnx_bitnet.validation/1"
    assert (document["reference"], document["got"]) == tuple(map(str, pair))
    assert (document["data"], document["batches"]) == ("a list of batches", 2)
    assert document["outputs"][0]["sqnr_db"] == result.outputs[0].metrics.sqnr_db
    assert document["layers"][0]["local"]["cosine"] > 0.9


def test_one_shot_data_feeds_both_models_in_one_pass(pair):
    calls = []
    result = validate(
        *pair, (batch for batch in BATCHES), threads=1, progress=lambda *call: calls.append(call)
    )
    check_numbers(result)
    assert calls == [(0, 0, "batch 0"), (1, 0, "batch 1"), (2, 2, "done")]


def test_models_with_external_data_are_tapped_where_they_are(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    reference = float_model(tmp_path / "deep" / "float.onnx", external=True)
    got = packed_model(tmp_path / "packed.onnx", external=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "deep")
    check_numbers(validate("float.onnx", got, BATCHES))
    check_numbers(validate(reference, "../packed.onnx", BATCHES))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_equals_itself(pair):
    for path in pair:
        result = validate(path, path)
        metrics = result.outputs[0].metrics
        assert (metrics.identical, metrics.sqnr_db) == (True, math.inf)
        assert all(layer.local and layer.local.identical for layer in result.layers)
        assert result.passes(min_sqnr=200, min_cosine=1)


def test_random_feeds_are_said_to_be_random(pair):
    result = validate(*pair, seed=3, dims={"n": 7})
    assert result.random_data
    assert result.data == "4 batches of random feeds (seed 3): x float32 [7, 8]"
    assert (result.batches, result.outputs[0].metrics.elements) == (4, 4 * 7 * K)
    assert result == validate(*pair, seed=3, dims={"n": 7})


def test_layers_can_be_left_out(pair):
    result = validate(*pair, BATCHES, layers=False)
    assert result.layers == ()
    assert_close(result.outputs[0].metrics, validate(*pair, BATCHES).outputs[0].metrics)


def test_layers_that_feed_each_other_and_have_several_nodes(tmp_path):
    """The first layer's y is the second's x; the second one is transposed and adds a value of the graph."""
    reference = save(
        tmp_path / "float.onnx",
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("Gemm", ["a", "w1", "x"], ["y"], transA=1, transB=1),
        ],
        {"w0": np.ascontiguousarray(FLOAT[0].T), "w1": FLOAT[1]},
        [value("x", [K, K])],
        [value("y", [K, K])],
    )
    got = save(
        tmp_path / "packed.onnx",
        [
            packed_node("x", "a", 0, "zeros", {"layer": "first", "x": "x", "y": "a"}),
            tagged(helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]), "second"),
            packed_node("t", "p", 1, "zeros", {"layer": "second", "x": "a", "y": "y"}),
            tagged(helper.make_node("Add", ["p", "x"], ["y"]), "second"),
        ],
        constants(),
        [value("x", [K, K])],
        [value("y", [K, K])],
    )
    x = np.concatenate([batch["x"] for batch in BATCHES])
    layers = {layer.name: layer for layer in validate(reference, got, {"x": x}).layers}
    a, quantized = x @ FLOAT[0].T, x @ TERNARY[0].T
    y = a.T @ FLOAT[1].T + x
    assert_close(layers["first"].local, expected([(a, quantized)]))
    assert_close(layers["second"].local, expected([(y, a.T @ TERNARY[1].T + x)]))
    assert_close(layers["second"].accumulated, expected([(y, quantized.T @ TERNARY[1].T + x)]))


def test_layers_that_share_an_input_transposed_and_rotated(tmp_path):
    """The second layer reads what nodes of the first one made of their input."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((6, 16, 1, 1)).astype(np.float32) for name in ("a", "b")}
    nodes = [helper.make_node("Conv", ["x", name], [f"y{name}"], name=name) for name in weights]
    outputs = [value(f"y{name}", ("n", 6, 5, 5)) for name in weights]
    reference = save(tmp_path / "float.onnx", nodes, weights, [value("x", ("n", 16, 5, 5))], outputs)
    got = tmp_path / "packed.onnx"
    bn.convert(reference, got, {"mode": "ternary", "rotation": "hadamard:16", "activation_bits": 32})
    feeds = [{"x": rng.standard_normal((2, 16, 5, 5)).astype(np.float32)}]
    result = validate(reference, got, feeds)
    local = {f"y{layer.name}": layer.local for layer in result.layers}
    for output in result.outputs:
        assert_close(local[output.name], output.metrics)
    kinds = [node.op_type for node in onnx.load(got).graph.node]
    assert kinds == ["Transpose", "BlockHadamard", "MatMulI2S", "Transpose", "MatMulI2S", "Transpose"]


def test_constants_of_a_layer_may_come_from_constant_nodes(tmp_path):
    arrays = constants()
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(arrays.pop(name)))
        for name in ("w0.i2s", "zeros")
    ]
    nodes.append(packed_node("x", "y", 0, "zeros", {"layer": "first", "x": "x", "y": "y"}))
    got = save(tmp_path / "packed.onnx", nodes, arrays)
    reference = save(
        tmp_path / "float.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": FLOAT[0].T.copy()}
    )
    (layer,) = validate(reference, got, BATCHES).layers
    assert_close(layer.local, expected([(b["x"] @ FLOAT[0].T, b["x"] @ TERNARY[0].T) for b in BATCHES]))
    assert layer.local == layer.accumulated


def test_errors_of_weights_and_activations_are_told_apart(tmp_path, pair):
    """The second layer of the packed model rounds its activations to 8 bits, the first does not."""
    model = onnx.load(pair[1])
    (bits,) = (given for given in model.graph.node[2].attribute if given.name == "activation_bits")
    bits.i = 8
    onnx.save(model, tmp_path / "packed8.onnx")
    layers = {layer.name: layer for layer in validate(pair[0], tmp_path / "packed8.onnx", BATCHES).layers}
    references = [run(batch["x"], FLOAT) for batch in BATCHES]
    float_x = [b @ TERNARY[1].T + BIAS for _, b, _ in references]
    rounded = []
    for _, b, _ in references:
        step = np.maximum(np.abs(b).max(axis=1, keepdims=True), 1e-5) / 127
        rounded.append(np.rint(b / step) * step @ TERNARY[1].T + BIAS)
    assert_close(
        layers["second"].weight, expected([(r[2], y) for r, y in zip(references, float_x, strict=True)])
    )
    assert_close(layers["second"].activations, expected(list(zip(float_x, rounded, strict=True))))
    assert_close(
        layers["second"].local, expected([(r[2], y) for r, y in zip(references, rounded, strict=True)])
    )
    assert layers["first"].activations.identical
    assert layers["first"].weight == layers["first"].local


def test_blame_is_the_share_of_the_local_noise(pair):
    layers = validate(*pair, BATCHES).layers
    noise = {layer.name: 10 ** (-layer.local.sqnr_db / 10) for layer in layers}
    assert {layer.name: layer.blame for layer in layers} == pytest.approx(
        {name: share / sum(noise.values()) for name, share in noise.items()}
    )
    assert layers[0].blame == max(layer.blame for layer in layers)


def test_layers_in_several_groups_give_the_same_numbers(pair):
    """64 bytes hold no layer, so that each makes a group of its own."""
    assert validate(*pair, BATCHES, memory=64) == validate(*pair, BATCHES)


# The user's own metric


def test_a_metric_sees_all_batches_and_the_outputs_of_both_models(pair):
    def rows_times_mean(batches, outputs):
        assert [batch["x"].shape for batch in batches] == [(3, K), (5, K)]
        assert [list(output) for output in outputs] == [["y"], ["y"]]
        return np.concatenate([output["y"] for output in outputs]).sum()

    result = validate(*pair, (batch for batch in BATCHES), metric=rows_times_mean)
    sums = [sum(run(batch["x"], weights)[2].sum() for batch in BATCHES) for weights in (FLOAT, TERNARY)]
    assert result.task.name == "rows_times_mean"
    assert (result.task.reference, result.task.got) == pytest.approx(sums, rel=1e-4)
    assert result.passes(min_metric=result.task.got)
    (failure,) = result.failures(min_metric=result.task.got + 1)
    assert failure.startswith("rows_times_mean is ")
    assert validate(*pair, BATCHES).failures(min_metric=0) == (
        "no metric was computed: give one (--metric FILE.py:FUNCTION) with min_metric",
    )


def test_a_metric_that_fails_or_is_not_there(tmp_path, pair):
    def broken(_batches, _outputs):
        raise KeyError("logits")

    assert fails(DataError, *pair, BATCHES, metric=broken) == "metric 'broken' fails: KeyError: 'logits'"
    script = tmp_path / "task.py"
    script.write_text("def count(batches, outputs):\n    return len(batches)\n")
    assert validate(*pair, BATCHES, metric=load_metric(f"{script}:count")).task.got == 2
    for where, text in (
        (f"{script}:other", "has no function 'other'"),
        (f"{tmp_path}/none.py:count", "no such file; write FILE.py:FUNCTION"),
        ("count", "no such file; write FILE.py:FUNCTION"),
    ):
        with pytest.raises(DataError, match=re.escape(text)):
            load_metric(where)
    script.write_text("1 / 0")
    with pytest.raises(DataError, match="ZeroDivisionError: division by zero"):
        load_metric(f"{script}:count")


# Layers out of reach


def test_layers_in_subgraphs_are_listed_last_with_a_note(tmp_path, pair):
    def model(path: Path, node: onnx.NodeProto, arrays: dict[str, np.ndarray]) -> Path:
        identity = helper.make_node("Identity", ["x"], ["e"])
        weights = [numpy_helper.from_array(array, f"inner.{name}") for name, array in arrays.items()]
        node.input[1:] = [f"inner.{name}" for name in node.input[1:]]
        then = helper.make_graph([node], "then", [], [value("t")], weights)
        other = helper.make_graph([identity], "else", [], [value("e")])
        nodes = [
            helper.make_node("If", ["yes"], ["m"], then_branch=then, else_branch=other),
            *onnx.load(pair[1]).graph.node[:-1],
            helper.make_node("Add", ["c", "m"], ["y"]),
        ]
        return save(path, nodes, constants(), [value("x"), value("yes", [], TensorProto.BOOL)])

    tags = {"layer": "inner", "x": "x", "y": "t"}
    got = model(tmp_path / "got.onnx", packed_node("x", "t", 0, "zeros", tags), constants())
    reference = model(
        tmp_path / "reference.onnx", helper.make_node("MatMul", ["x", "w"], ["t"]), {"w": FLOAT[0].T.copy()}
    )
    result = validate(reference, got)
    assert [layer.name for layer in result.layers][-1] == "inner"
    assert result.layers[-1].to_dict() == {
        "name": "inner",
        "index": 0,
        "blame": None,
        "local": None,
        "weight": None,
        "activations": None,
        "accumulated": None,
        "note": "it is inside a subgraph or function, whose values are out of reach",
    }
    assert all(layer.local and layer.local.identical for layer in result.layers[:-1])


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({}, "the model has no record of its float layer; convert it again"),
        ({"layer": "l", "y": "other"}, "the model has no record of its float layer; convert it again"),
        (
            {"layer": "l", "x": "x", "y": "z"},
            "the reference has no value 'z'; is it the model that was converted?",
        ),
    ],
)
def test_layers_without_a_counterpart_have_a_note(tmp_path, pair, tags, note):
    nodes = [packed_node("x", "z", 0, "zeros", tags), helper.make_node("Identity", ["z"], ["y"])]
    result = validate(pair[0], save(tmp_path / "got.onnx", nodes, constants()), BATCHES)
    (layer,) = result.layers
    assert (layer.local, layer.accumulated, layer.note) == (None, None, note)


# Gates


def validation(**outputs: Metrics) -> Validation:
    metrics = tuple(OutputMetrics(name, value) for name, value in outputs.items())
    return Validation("a", "b", "data", False, 1, metrics)


def test_gates_name_the_outputs_that_miss_them():
    result = validation(
        good=Metrics(1, False, sqnr_db=30.0, cosine=0.999),
        bad=Metrics(1, False, sqnr_db=9.87654321, cosine=0.9),
        ids=Metrics(4, False, agreement=0.25),
    )
    assert result.passes()
    assert result.passes(min_sqnr=9)
    assert not result.passes(min_sqnr=10)
    assert result.failures(10) == ("output 'bad': SQNR 9.87654 dB is below 10 dB",)
    assert result.failures(None, 0.95) == ("output 'bad': cosine 0.9 is below 0.95",)
    assert len(result.failures(min_sqnr=40, min_cosine=0.95)) == 3
    broken = Metrics(1, False, sqnr_db=-math.inf, cosine=0.0, nonfinite_differ=1)
    assert validation(y=broken).failures(-1e9) == ("output 'y': SQNR -inf dB is below -1e+09 dB",)


def test_integer_outputs_alone_must_be_identical_to_pass_a_gate():
    result = validation(ids=Metrics(4, False, agreement=0.75))
    assert result.passes()
    assert result.failures(min_sqnr=1) == ("output 'ids': only 75.00% of its elements agree",)
    assert validation(ids=Metrics(4, True, agreement=1.0)).passes(min_sqnr=1)


# Mistakes


def fails(kind: type[Exception], *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        validate(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_models_with_other_inputs_or_outputs(tmp_path, pair):
    relu = [helper.make_node("Relu", ["z"], ["y"])]
    other = save(tmp_path / "other.onnx", relu, {}, [value("z")])
    assert fails(ModelError, pair[0], other) == (
        f"{other}: its inputs are z (float32), those of {pair[0]} are x (float32); "
        "compare a model with its own conversion"
    )
    relu = [helper.make_node("Relu", ["x"], ["z"])]
    other = save(tmp_path / "other.onnx", relu, {}, [value("x")], [value("z")])
    assert f"{other}: its outputs are z (FLOAT), those of {pair[0]} are y (FLOAT);" in fails(
        ModelError, pair[0], other
    )
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    half = [value(name, kind=TensorProto.FLOAT16) for name in "xy"]
    other = save(tmp_path / "other.onnx", relu, {}, half[:1], half[1:])
    assert f"{other}: its inputs are x (float16)" in fails(ModelError, pair[0], other)


def test_outputs_of_other_shapes(tmp_path, pair):
    nodes = [helper.make_node("Concat", ["x", "x"], ["y"], axis=1)]
    wide = save(tmp_path / "wide.onnx", nodes, {}, outputs=[value("y", ["n", "m"])])
    assert fails(ModelError, pair[0], wide, BATCHES) == (
        f"{wide}: output 'y' on data, batch 0: shape [3, 16] instead of [3, 8] "
        f"as in {pair[0]}; convert it again"
    )


def test_files_that_are_no_models(tmp_path, pair):
    missing = tmp_path / "missing.onnx"
    assert str(missing) in fails(ModelError, pair[0], missing)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\x00not a model")
    assert str(garbage) in fails(ModelError, garbage, pair[1])


def test_a_model_that_onnxruntime_cannot_open(tmp_path, pair):
    nodes = [helper.make_node("NoSuchOp", ["x"], ["y"])]
    strange = save(tmp_path / "strange.onnx", nodes, {})
    assert fails(ModelError, pair[0], strange).startswith(f"{strange}: onnxruntime cannot open it: ")
    assert fails(ModelError, strange, pair[0]).startswith(f"{strange}: onnxruntime cannot open it: ")


def test_a_model_that_fails_to_run(tmp_path, pair):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    brittle = save(tmp_path / "brittle.onnx", nodes, {"shape": np.array([3, K])})
    text = fails(ModelError, pair[0], brittle, BATCHES)
    assert text.startswith(f"{brittle}: onnxruntime fails on data, batch 1: ")
    assert "random" not in text
    text = fails(ModelError, brittle, brittle)
    assert text.startswith(f"{brittle}: onnxruntime fails on random feeds, batch 0: ")
    assert text.endswith("; random feeds may not suit it: give data, or sizes (dims) of n")


def test_data_that_does_not_fit(pair):
    assert fails(DataError, *pair, [{"z": np.ones(3)}]).startswith(
        "data, batch 0: the model has no input 'z'"
    )
    assert "no batches" in fails(DataError, *pair, iter([]))
    assert "nothing was compared" in fails(DataError, *pair, [{"x": np.zeros((0, K), np.float32)}])
    assert "nothing was compared" in fails(DataError, *pair, [{"x": np.full((2, K), np.nan, np.float32)}])
    assert "no such file" in fails(DataError, *pair, "nowhere.npz")


def test_what_is_not_finite_in_the_reference_is_noted(pair):
    x = np.ones((4, K), np.float32)
    x[1] = np.inf
    result = validate(*pair, [{"x": x}])
    size = result.outputs[0].metrics.elements
    assert f"output 'y': {size // 4} of {size} elements are NaN or infinite in the reference" in result.notes


def test_outputs_that_are_no_tensors_are_noted(tmp_path):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["s"]), helper.make_node("Relu", ["x"], ["y"])]
    outputs = [helper.make_value_info("s", kind), value("y")]
    path = save(tmp_path / "sequence.onnx", nodes, {}, outputs=outputs)
    result = validate(path, path, BATCHES)
    assert result.notes == ("output 's' is no tensor and was not compared",)
    assert [output.name for output in result.outputs] == ["y"]
