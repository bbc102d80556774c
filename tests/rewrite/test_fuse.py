"""Layers with the same activations in one op: the same bits, the same names, and what is not fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from rewrite.graphs import B, K, N, build, numbers, ternary
from rewrite.steps import initializers, ops, stock, with_library

import onnx_bitnet as bn
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.report import Report

WEIGHTS = {
    "Q": ternary(K, N),
    "S": ternary(K, 4, scale=0.25, seed=1),
    "V": ternary(K, 3, seed=2) * np.float32([1, 2, 4]),
    "T": ternary(N, 5, seed=3),
}


def model(nodes: str, outputs: str, opset: int = 18) -> onnx.ModelProto:
    return build(f"g (float[2, 3, {K}] x) => ({outputs}) {{ {nodes} }}", WEIGHTS | B, opset=opset)


QKV = (
    "[q] p = MatMul (x, Q) \n a = Add (p, B) \n [k] b = MatMul (x, S) \n [v] c = MatMul (x, V)",
    f"float[2, 3, {N}] a, float[2, 3, 4] b, float[2, 3, 3] c",
)


def converted(
    before: onnx.ModelProto, folder: Path, recipe: dict[str, object]
) -> tuple[onnx.ModelProto, Report]:
    onnx.save(before, folder / "in.onnx")
    report = bn.convert(folder / "in.onnx", folder / "out.onnx", bn.Recipe(**recipe), force=True)
    return onnx.load(folder / "out.onnx"), report


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("recipe", [{}, {"activation_bits": 8}, {"activation_bits": 32}, {"format": "t5"}])
def test_results_are_the_same_bits(recipe: dict[str, object], opset: int, tmp_path: Path):
    before = model(*QKV, opset=opset)
    apart, _ = converted(before, tmp_path, recipe)
    together, report = converted(before, tmp_path, recipe | {"fuse": True})
    assert ops(together) == ["MatMulT5" if "format" in recipe else "MatMulI2S", "Split"]
    assert [layer.fused for layer in report.layers] == ["q+k+v"] * 3
    assert report.lossless
    feeds = {"x": np.random.default_rng(4).normal(size=(2, 3, K)).astype(np.float32)}
    for one, other in zip(with_library(apart, feeds), with_library(together, feeds), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(stock(apart, feeds), stock(together, feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    left = {
        name for name in initializers(together) if name in WEIGHTS or name.startswith("onnx_bitnet.zeros")
    }
    assert left == {"T"}  # which nothing read before, either


def test_validate_still_compares_each_layer(tmp_path: Path):
    converted(model(*QKV), tmp_path, {"fuse": True})
    feeds = [{"x": numbers(2, 3, K)}]
    result = bn.validate(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds)
    assert sorted(layer.name for layer in result.layers) == ["k", "q", "v"]
    for layer in result.layers:
        assert layer.local is not None
        assert layer.local.cosine is not None
        assert layer.local.cosine > 0.9999


@pytest.mark.parametrize(
    ("nodes", "outputs", "recipe"),
    [
        (
            "h = Relu (x) \n a = MatMul (x, Q) \n b = MatMul (h, S)",
            f"float[2, 3, {N}] a, float[2, 3, 4] b",
            {},
        ),
        ("p = MatMul (x, Q) \n a = MatMul (p, T)", "float[2, 3, 5] a", {}),
        (*QKV, {"rules": [("q", {"activation_bits": 8}), ("k", {"format": "t5"})]}),
    ],
    ids=["other x", "in a row", "other settings"],
)
def test_what_differs_stays_apart(nodes: str, outputs: str, recipe: dict[str, object], tmp_path: Path):
    after, report = converted(model(nodes, outputs), tmp_path, recipe | {"fuse": True})
    assert "Split" not in ops(after)
    assert not any(layer.fused for layer in report.layers)


def test_branches_stay_apart(tmp_path: Path):
    before = build(
        f"""g (bool c, float[b, {K}] x) => (float[b, {N}] y, float[b, 4] z) {{
            z = MatMul (x, S)
            y = If (c) <
                then_branch = t () => (float[b, {N}] u) {{ u = MatMul (x, Q) }},
                else_branch = e () => (float[b, {N}] v) {{ v = MatMul (x, R) }}
            >
        }}""",
        WEIGHTS | {"R": ternary(K, N, seed=8)},
    )
    after, report = converted(before, tmp_path, {"fuse": True})
    assert len(report.converted) == 3
    assert ops(after) == ["MatMulI2S", "If"]


def test_fuse_is_true_or_false():
    with pytest.raises(RecipeError, match="fuse = 'auto' is not known"):
        bn.Recipe(fuse="auto")  # type: ignore[arg-type]
