"""MatMulPanel, whose weight lies in the file as kernels read it: what MatMulI2S computes, in place."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import packed
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from sessions import assert_same_bits, open_model, run

import onnx_bitnet as bn
from onnx_bitnet import reference
from onnx_bitnet.errors import ModelError, RecipeError
from onnx_bitnet.formats import PANEL_OP, from_panels, panel_shape, to_panels
from onnx_bitnet.inspection import inspect
from onnx_bitnet.rewrite.packed import packed_nodes

SIZES = [(1, 1), (64, 16), (64, 97), (60, 200), (70, 150), (130, 33), (192, 256)]


class PanelLayer(packed.Layer):
    """A layer of i2s codes as panels."""

    @property
    def op_type(self) -> str:
        return PANEL_OP

    def initializers(self) -> list[onnx.TensorProto]:
        panels = reference.pack_panels(reference.unpack_i2s(self.weight, self.k))
        return [numpy_helper.from_array(panels, "weight"), *super().initializers()[1:]]


def as_panels(layer: packed.Layer) -> PanelLayer:
    block_size = 32 if layer.block_size == 33 < layer.k else layer.block_size
    if block_size != layer.block_size:
        groups = len(reference.group_starts(layer.k, block_size))
        scale, zero_point = (
            np.resize(part, (*part.shape[:2], groups)) if part.shape[2] > 1 else part
            for part in (layer.scale, layer.zero_point)
        )
        layer = dataclasses.replace(layer, block_size=block_size, scale=scale, zero_point=zero_point)
    return PanelLayer(**dataclasses.asdict(layer))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bytes_are_those_of_the_oracle(n: int, k: int):
    codes = np.random.default_rng(k).integers(0, 4, (2, n, k), np.uint8)
    weight = reference.pack_i2s(codes)
    panels = to_panels(weight, k)
    assert panels.shape == (2, *panel_shape(n, k))
    assert np.array_equal(panels, reference.pack_panels(codes))
    assert np.array_equal(reference.unpack_panels(panels, n, k), codes)
    assert np.array_equal(from_panels(panels, n, k), weight)


def test_bytes_are_the_same_everywhere():
    first = np.arange(64 * 16).reshape(64, 16) % 4
    assert reference.pack_panels(first)[0, :8].tolist() == [0, 85, 170, 255, 0, 85, 170, 255]
    codes = (np.arange(70 * 300).reshape(70, 300) * 7 // 5 % 4).astype(np.uint8)
    panels = to_panels(reference.pack_i2s(codes)[None], 300)
    assert hashlib.sha256(panels.tobytes()).hexdigest() == (
        "e66074e48d7ac6a2b4f1fb00aa3e5404f8512a4eacf64047f61a4fee41e21e67"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("seed", range(12))
def test_integer_activations_give_the_bits_of_the_oracle(seed: int, bits: int, dtype: type):
    layer = as_panels(packed.random_case(seed, bits))
    x = packed.rows(seed, (1 + seed % 7, layer.k), dtype)
    assert_same_bits(run(layer.model(dtype), x), layer.expected(x))


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_results_are_those_of_rows(n: int, k: int, bits: int):
    layer = packed.random_layer(np.random.default_rng(k), n, k, planes=2, bits=bits)
    panels, x = PanelLayer(**dataclasses.asdict(layer)), packed.rows(k, (3, k))
    assert_same_bits(run(panels.model(), x), run(layer.model(), x))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_planes_merge_as_those_of_rows(n: int, k: int):
    layer = packed.random_layer(np.random.default_rng(k), n, k, planes=2, bits=16, ternary=True)
    layer = dataclasses.replace(layer, scale=np.stack([4 * layer.scale[0], layer.scale[0]]))
    panels, x = PanelLayer(**dataclasses.asdict(layer)), packed.rows(k, (3, k))
    assert_same_bits(run(panels.model(), x), layer.expected(x))


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 25])
def test_body_computes_the_op(opset: int):
    for seed in range(3):
        layer = as_panels(packed.random_case(seed + opset, (8, 16, 32)[seed]))
        model, x = layer.model(opset=opset), packed.rows(seed, (2, layer.k))
        onnx.checker.check_model(model, full_check=True)
        want = layer.expected(x)
        plain = bn.runtime.import_onnxruntime().InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for got in (plain.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max(initial=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n": 65},
            r"weight has shape \[1, 1, 1024\]; with N = 65 and K = 64 it must be \[1 to 4, 2, 1024\]",
        ),
        ({"n": 63}, "a code past N or K is not 1"),
        ({"k": 63}, "a code past N or K is not 1"),
        ({"k": 80}, r"it must be \[1 to 4, 1, 1280\]"),
        ({"block_size": 24}, "block_size must be a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], message: str):
    layer = packed.random_layer(np.random.default_rng(0), 64, 64, shared_rows=True, shared_groups=True)
    model = PanelLayer(**dataclasses.asdict(layer)).model()
    node = model.graph.node[0]
    for attribute in node.attribute:
        names = {"n": "N", "k": "K", "block_size": "block_size"}
        for key, number in change.items():
            if attribute.name == names[key]:
                attribute.i = number
    for tensor in model.graph.input:
        tensor.type.tensor_type.ClearField("shape")
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    if "n" in change:
        for tensor in list(model.graph.initializer):
            if tensor.name == "bias":
                tensor.CopyFrom(numpy_helper.from_array(np.zeros(change["n"], np.float32), "bias"))
    with pytest.raises(Exception, match=message):
        open_model(model)


def converted(tmp_path: Path, layout: str, n: int = 200, k: int = 150) -> Path:
    """Convert a model of one ternary layer."""
    weight = np.random.default_rng(0).integers(-1, 2, (k, n)).astype(np.float32) / 4
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "graph",
        [packed.value("x", np.float32, ["m", k])],
        [packed.value("y", np.float32, ["m", n])],
        [numpy_helper.from_array(weight, "w")],
    )
    source, target = tmp_path / "source.onnx", tmp_path / f"{layout}.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), source
    )
    report = bn.convert(source, target, bn.Recipe(layout=layout))
    assert report.lossless
    assert report.converted
    return target


def test_conversion_writes_panels_and_reads_them(tmp_path: Path):
    rows, panels = (converted(tmp_path, layout) for layout in ("canonical", "panel"))
    (node,) = packed_nodes(ir.load(panels))
    assert node.node.op_type == PANEL_OP
    (layer,), (expected,) = inspect(panels).packed, inspect(rows).packed
    assert (layer.format, layer.n, layer.k, layer.codes) == ("i2s", 200, 150, expected.codes)
    x = packed.rows(0, (5, 150))
    sessions = [bn.session(path) for path in (rows, panels)]
    assert_same_bits(*(session.run(None, {"x": x})[0] for session in sessions))


def test_conversion_plans_as_many_bytes(tmp_path: Path):
    converted(tmp_path, "panel")
    recipe = bn.Recipe(layout="panel")
    (planned,) = bn.plan(tmp_path / "source.onnx", recipe).converted
    (node,) = packed_nodes(ir.load(tmp_path / "panel.onnx"))
    assert planned.packed_bytes == node.nbytes


def test_damaged_panels_are_told(tmp_path: Path):
    path = converted(tmp_path, "panel")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "w.panel":
            tensor.raw_data = tensor.raw_data[:-1] + bytes([0])
    onnx.save(model, path)
    with pytest.raises(ModelError, match="a code past N or K is not 1"):
        inspect(path)


def test_recipe_refuses_other_formats():
    with pytest.raises(RecipeError, match="layout"):
        bn.Recipe(layout="rows")
    with pytest.raises(RecipeError, match="layout 'panel' holds i2s codes only"):
        bn.Recipe(layout="panel", format="t5")
    with pytest.raises(RecipeError, match="layout 'panel' holds i2s codes only"):
        bn.Recipe(layout="panel", rules=[("*", {"format": "tl2"})])
    assert bn.Recipe(layout="panel", format="i2s").to_dict()["layout"] == "panel"
