"""Weights that are ternary but for rounding: found, packed with their scale, and reported."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from rewrite.graphs import build
from rewrite.steps import find_one

from onnx_bitnet.conversion.decide import Keep, decide
from onnx_bitnet.conversion.nearly import nearly
from onnx_bitnet.quantization.detect import detect
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.rewrite.records import Linear

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def estimated(
    dtype: type, n: int = 40, k: int = 96, *, per_output: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A weight w + (q - w) as training code computes it, and q."""
    w = np.random.default_rng(5).normal(size=(n, k)).astype(np.float32) * np.float32(0.02)
    mean = np.abs(w).mean(axis=1 if per_output else None, keepdims=True)
    q = (np.clip(np.rint(w / mean), -1, 1) * mean).astype(dtype)
    w = w.astype(dtype)
    return (w + (q - w).astype(dtype)).astype(dtype), q


@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_codes_are_those_of_what_was_meant(dtype: type, per_output: bool):
    weight, q = estimated(dtype, per_output=per_output)
    if dtype != ml_dtypes.bfloat16 or per_output:  # in bfloat16 the differences of one seed may all be exact
        assert detect(weight) is None
    exact = nearly(weight)
    assert exact is not None
    assert exact.scale.shape == (40 if per_output else 1, 1)
    packed = quantize_layer(weight, LayerSpec(exact=exact))
    np.testing.assert_array_equal(packed.codes()[0], np.sign(q.astype(np.float32)) + 1)
    assert packed.sqnr_db is None or packed.sqnr_db > 40


@pytest.mark.parametrize("dtype", TYPES)
def test_ordinary_weights_are_not(dtype: type):
    weight = np.random.default_rng(6).normal(size=(8, 64)).astype(dtype)
    assert nearly(weight) is None
    weight[0] = 0
    assert nearly(weight) is None


def test_zeros_must_be_exact():
    weight, _ = estimated(np.float32)
    weight[weight == 0] = 1e-9
    assert nearly(weight) is None


def test_a_matrix_of_zeros_is_not_nearly_but_exactly_ternary():
    assert nearly(np.zeros((3, 40), np.float32)) is None


def test_lossless_leaves_them_and_auto_says_so():
    weight, _ = estimated(np.float32)
    linear = find_one(build("g (float[b, 96] x) => (float[b, 40] y) { y = MatMul (x, W) }", {"W": weight.T}))
    assert isinstance(linear, Linear)
    assert isinstance(decide(linear, weight, Recipe(mode="lossless")), Keep)
    spec = decide(linear, weight, Recipe())
    assert isinstance(spec, LayerSpec)
    assert spec.detail.endswith("the weight is ternary up to rounding")
