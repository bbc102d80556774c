"""Rows of padding are not calibrated by: what is found is what the texts alone would give."""

from __future__ import annotations

import minilm
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_bitnet as bn
from onnx_bitnet.data.padding import compared
from onnx_bitnet.errors import DataError, RecipeError
from onnx_bitnet.rewrite.packed import packed_nodes

LENGTHS = (3, 9, 6, 12)
WIDTH = 32


@pytest.fixture
def model(tmp_path):
    """Tokens to vectors, a layer on (batch, sequence, K), another on (batch * sequence, K), their mean."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((50, WIDTH)).astype(np.float32),
        "a": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "b": rng.standard_normal((WIDTH, 8)).astype(np.float32),
        "flat": np.array([-1, WIDTH], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "a"], ["h"], name="layer.a"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "b"], ["y"], name="layer.b"),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["m"], ["tokens"]),
    ]
    axes = ["batch", "sequence"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, axes)
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8]),
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, 1]),
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "padded", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(made, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def texts(seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(50, size=(1, length)) for length in LENGTHS]
    return [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids]


def padded(feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return all in one batch, filled up with token 7."""
    full = np.full((len(feeds), max(LENGTHS)), 7), np.zeros((len(feeds), max(LENGTHS)), np.int64)
    for row, feed in enumerate(feeds):
        length = feed["input_ids"].shape[1]
        full[0][row, :length], full[1][row, :length] = feed["input_ids"], 1
    return [dict(zip(("input_ids", "attention_mask"), full, strict=True))]


def assert_same_statistics(got: bn.Calibration, expected: bn.Calibration) -> None:
    assert list(got.layers) == list(expected.layers)
    for name, one in got.layers.items():
        other = expected.layers[name]
        assert one.rows == other.rows
        for field in ("min", "max", "mean", "variance", "channel_mean", "channel_absmean", "second_moment"):
            a, b = getattr(one, field), getattr(other, field)
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max(), err_msg=field)


def test_statistics_are_those_of_the_texts_alone(model):
    got = bn.calibrate(model, padded(texts()))
    assert got.layers["layer.a"].rows == got.layers["layer.b"].rows == sum(LENGTHS)
    assert_same_statistics(got, bn.calibrate(model, texts()))


def test_none_counts_every_row(model):
    got = bn.calibrate(model, padded(texts()), mask="none")
    assert got.layers["layer.a"].rows == len(LENGTHS) * max(LENGTHS)


def test_conversions_are_those_of_the_texts_alone(model, tmp_path):
    def weights(data, mask="attention_mask") -> list[np.ndarray]:
        recipe = {"mode": "ternary", "granularity": "channel", "mask": mask}
        bn.convert(model, tmp_path / "out.onnx", recipe, data=data, force=True)
        return [node.quantized().dequantize() for node in packed_nodes(ir.load(tmp_path / "out.onnx"))]

    alone, together = weights(texts()), weights(padded(texts()))
    unmasked = weights(padded(texts()), mask="none")
    for a, b, c in zip(alone, together, unmasked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        assert np.abs(a - c).max() > 1e-2


def test_a_batch_of_padding_alone_has_no_rows(model):
    nothing = {name: np.zeros((2, 5), np.int64) for name in ("input_ids", "attention_mask")}
    got = bn.calibrate(model, [*padded(texts()), nothing])
    assert got.layers["layer.a"].rows == sum(LENGTHS)


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_of_other_values_says_nothing(model, value):
    (batch,) = padded(texts())
    got = bn.calibrate(model, [batch | {"attention_mask": batch["attention_mask"] * value}])
    assert got.layers["layer.a"].rows == len(LENGTHS) * max(LENGTHS)


def test_a_mask_may_have_another_name_but_must_be_there(model, tmp_path):
    data = padded(texts())
    with pytest.raises(DataError, match=r"mask 'mask' is no input of the model; its inputs are input_ids,"):
        bn.calibrate(model, data, mask="mask")
    with pytest.raises(DataError, match="mask 'mask' is no input"):
        bn.convert(model, tmp_path / "out.onnx", {"mode": "ternary", "mask": "mask"}, data=data)
    with pytest.raises(RecipeError, match="mask = 3"):
        bn.Recipe(mask=3)


def test_minilm_reads_the_same_from_a_batch_as_from_its_sentences(minilm_model):
    sentences = minilm.sentences()[0][:4]
    alone = [minilm.tokenize([sentence]) for sentence in sentences]
    together = bn.calibrate(minilm_model, minilm.tokenize(sentences), second_moments=False)
    assert_same_statistics(together, bn.calibrate(minilm_model, alone, second_moments=False))


def converted(model, tmp_path):
    bn.convert(model, tmp_path / "out.onnx", {"mode": "ternary"})
    return tmp_path / "out.onnx"


def test_what_is_validated_is_what_the_texts_alone_would_give(model, tmp_path):
    """Outputs and layers alike; the order of batches does not matter, and `none` counts all."""
    got = converted(model, tmp_path)
    alone, together = bn.validate(model, got, texts()), bn.validate(model, got, padded(texts()))
    pairs = [(a.metrics, b.metrics) for a, b in zip(alone.outputs[:1], together.outputs[:1], strict=True)]
    for left, right in zip(alone.layers, together.layers, strict=True):
        assert left.name == right.name
        pairs += [(getattr(left, part), getattr(right, part)) for part in ("local", "weight", "accumulated")]
    for left, right in pairs:
        assert left.elements == right.elements
        for name in ("sqnr_db", "cosine", "relative_l2", "max_abs"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-4), name
    everything = bn.validate(model, got, padded(texts()), mask="none")
    assert everything.outputs[0].metrics.elements > together.outputs[0].metrics.elements
    with pytest.raises(DataError, match="mask 'no' is no input of the model"):
        bn.validate(model, got, padded(texts()), mask="no")


def test_goals_are_about_tokens(model, tmp_path):
    """What is planned for texts in one padded batch is what is planned for them alone."""
    goal = {"min_cosine": 0.98, "activation_bits": 16}
    together = bn.plan(model, goal, data=padded(texts()) * 4)
    assert together.recipe["mask"] == "attention_mask"
    bn.convert(model, tmp_path / "out.onnx", goal, data=padded(texts()) * 4)
    assert bn.validate(model, tmp_path / "out.onnx", texts()).passes(min_cosine=0.98)


@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 3, 5), (4, 5)), ((6, 5), (4, 5)), ((2, 3), (4,)), ((2, 5), (2, 5)), ((), ())]
)
def test_rows_at_tokens_are_compared(shape, rows):
    there = np.array([[True, True, False], [True, True, False]])
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    assert compared(array, there).shape == rows
    assert compared(array, None) is array
