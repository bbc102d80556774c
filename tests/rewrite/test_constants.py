"""Where weights come from: loaded when asked for, never copied on the way, the same for layers that share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite.graphs import ROADS, K, N, W, build, ternary
from rewrite.steps import find, find_one

from onnx_bitnet import convert
from onnx_bitnet.errors import EvaluationError, ModelError
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.records import Linear, Refusal
from onnx_bitnet.rewrite.scan import scan

VIEWED = (
    "weight_transpose",
    "weight_identity",
    "weight_reshape",
    "weight_squeeze",
    "weight_squeeze_all_opset_12",
    "weight_unsqueeze",
    "weight_constant_node",
    "weight_constant_floats",
)
WIDENED = ("weight_cast", "weight_bfloat16")


def weight_of(model: onnx.ModelProto) -> Constant:
    linear = find_one(model)
    assert isinstance(linear, Linear)
    return linear.weight


def through(nodes: str, weights: dict[str, np.ndarray], opset: int = 18) -> onnx.ModelProto:
    text = f"g (float[b, {K}] x) => (float[b, {N}] y) {{ {nodes} \n y = MatMul (x, w) }}"
    return build(text, weights, opset=opset, domains=["other"])


@pytest.mark.parametrize("name", ROADS)
def test_weight_is_found_behind(name: str):
    weight = weight_of(ROADS[name].model)
    array = weight.array()
    assert (weight.n, weight.k) == array.shape == (N, K)
    assert weight.dtype == ir.DataType.FLOAT
    assert array.dtype == np.float32
    assert weight.nbytes == array.nbytes
    assert weight.stored == (name in VIEWED + WIDENED)


@pytest.mark.parametrize("name", VIEWED)
def test_stored_weight_is_viewed_not_copied(name: str):
    weight = weight_of(ROADS[name].model)
    loaded = weight.tensor.numpy()
    assert np.shares_memory(replace(weight, tensor=ir.tensor(loaded)).array(), loaded)


def test_float16_and_bfloat16_weights_keep_their_type():
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        tensor = ir.tensor(ternary(K, N).astype(dtype.numpy()), name="W")
        value = ir.Value(name="W", const_value=tensor)
        weight = Constant(value, tensor, (K, N)).transpose(1, 0)
        assert weight.array().dtype == dtype.numpy()
        assert weight.nbytes == 2 * K * N
        # the factor is applied in float32
        expected = weight.array().astype(np.float32) * np.float32(0.1)
        np.testing.assert_array_equal(weight.scale(0.1).array(), expected)


def test_views_that_undo_each_other_vanish():
    tensor = ir.tensor(ternary(4, 6), name="W")
    weight = Constant(ir.Value(name="W", const_value=tensor), tensor, (4, 6))
    assert weight.transpose(1, 0).transpose(1, 0).key == weight.key
    assert weight.reshape(24).reshape(4, 6).key == weight.key
    assert weight.reshape(2, 12).reshape(3, 8).views == weight.reshape(3, 8).views
    assert weight.transpose(1, 0).key != weight.key
    assert weight.scale(2.0).key != weight.key
    turned = weight.reshape(2, 3, 4).transpose(2, 0, 1).transpose(1, 0, 2)
    np.testing.assert_array_equal(
        turned.array(), weight.array().reshape(2, 3, 4).transpose(2, 0, 1).transpose(1, 0, 2)
    )


def test_layers_that_see_the_same_tensor_in_the_same_way_have_equal_keys():
    proto = build(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            t = Transpose (W)
            p = MatMul (x, W)
            q = MatMul (p, t)
            r = Gemm (q, W)
            y = Gemm <transB = 1> (r, W)
        }}""",
        {"W": ternary(K, K)},
    )
    first, second, third, fourth = (linear.weight.key for linear in find(proto) if isinstance(linear, Linear))
    assert first == third != second == fourth


def test_shape_of_a_computed_weight_is_known_without_computing_it(monkeypatch: pytest.MonkeyPatch):
    from onnx_bitnet.rewrite import evaluate

    def fail(*_: object) -> np.ndarray:
        raise AssertionError("computed")

    monkeypatch.setattr(evaluate, "_run", fail)
    for name in ("weight_cast", "weight_dq_axis", "weight_online_chain"):
        assert weight_of(ROADS[name].model).shape == (N, K)


def test_external_data_is_mapped_and_its_absence_is_one_line(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(
        through("w = Identity (W)", W), path, save_as_external_data=True, size_threshold=0, location="data"
    )
    (linear,) = scan(ir.load(path))
    assert isinstance(linear, Linear)
    np.testing.assert_array_equal(linear.weight.array(), W["W"].T)
    (gone,) = scan(ir.load(path))
    (tmp_path / "data").unlink()
    assert isinstance(gone, Linear)
    with pytest.raises(ModelError, match=r"weight 'W': cannot read its data: .*No such file"):
        gone.weight.array()


@pytest.mark.parametrize(
    ("nodes", "detail"),
    [
        ("w = other.Decode (W)", "'w' is computed by other.Decode"),
        ("v = other.Decode (W) \n w = Transpose (v)", "'v' is computed by other.Decode"),
        ("w = Reshape (W, shape)", f"'w': Reshape does not fit a constant of shape [{K}, {N}]"),
        ("w = Transpose <perm = [0, 0]> (W)", f"'w': Transpose does not fit a constant of shape [{K}, {N}]"),
    ],
)
def test_weight_that_cannot_be_computed_is_refused(nodes: str, detail: str):
    found = find_one(through(nodes, W | {"shape": np.array([7, -1])}))
    assert isinstance(found, Refusal)
    assert (found.reason, found.detail) == (Reason.WEIGHT_NOT_EVALUATED, detail)


def test_subgraph_that_fails_when_it_runs_is_refused_or_raises():
    # shapes that do not fit: without a stated shape it shows at once
    found = find_one(through("v = Mul (W, V) \n w = Relu (v)", W | {"V": ternary(5)}))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_EVALUATED
    assert "'w': its constant subgraph cannot be computed" in found.detail
    # with one it shows when the weight is loaded
    proto = through("v = Mul (W, V) \n w = Relu (v)", W | {"V": ternary(5)})
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("w", 1, [K, N]))
    with pytest.raises(EvaluationError, match="'w': its constant subgraph cannot be computed"):
        weight_of(proto).array()


def test_stated_shape_that_is_wrong_raises():
    proto = through("w = Relu (W)", W)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("w", 1, [K, N + 1]))
    message = f"'w': the model states shape ({K}, {N + 1}), it computes to ({K}, {N})"
    with pytest.raises(EvaluationError, match=re.escape(message)):
        weight_of(proto).array()


def test_random_weight_is_not_constant():
    found = find_one(through(f"w = RandomNormal <shape = [{K}, {N}]> ()", {}))
    assert isinstance(found, Refusal)
    assert found.reason is Reason.WEIGHT_NOT_CONSTANT


def test_constant_subgraph_may_call_functions():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ w = local.Half (W) \n y = MatMul (x, w) }}",
        W,
        domains=["local"],
        functions="""<domain: "local", opset_import: ["" : 18]>
        Half (v) => (h) { two = Constant <value = float {2.0}> () \n h = Div (v, two) }""",
    )
    np.testing.assert_array_equal(weight_of(proto).array(), W["W"].T / 2)


def test_convert_leaves_a_layer_whose_weight_fails_to_compute(tmp_path: Path):
    proto = through("v = Mul (W, V) \n w = Relu (v) \n z = MatMul (x, W)", W | {"V": ternary(5)})
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("w", 1, [K, N]))
    onnx.save(proto, tmp_path / "model.onnx")
    report = convert(tmp_path / "model.onnx", tmp_path / "packed.onnx")
    assert [layer.reason for layer in report.layers] == [None, Reason.WEIGHT_NOT_EVALUATED]
