"""The oracle against numbers worked out by hand and against plain float arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from onnx_bitnet import reference


def test_quantize_rows_scales_by_the_largest_magnitude():
    q, inv_s = reference.quantize_rows(np.array([[-2.0, 1.0, 0.5]], np.float32), 8)
    assert q.tolist() == [[-127, 64, 32]]  # 63.5 and 31.75: halves go to the even integer
    assert inv_s[0] == np.float32(2) / np.float32(127)


def test_quantize_rows_of_zeros_is_zero():
    q, inv_s = reference.quantize_rows(np.zeros((1, 4), np.float16), 16)
    assert not q.any()
    assert inv_s[0] == np.float32(1e-5) / np.float32(32767)


@pytest.mark.parametrize("bits", [8, 16])
def test_quantize_rows_clamps_with_a_static_scale(bits: int):
    q, inv_s = reference.quantize_rows(np.array([[-1e6, 1e6, 0.75, -0.25]], np.float32), bits, 0.5)
    top = 2 ** (bits - 1)
    assert q.tolist() == [[-top, top - 1, 2, 0]]
    assert inv_s.tolist() == [0.5]


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("static", [0.0, 0.5])
def test_rows_with_nan_or_inf_give_rows_of_nan(bits: int, bad: float, static: float):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    one = np.ones((1, 1, 1), np.float32)
    y = reference.matmul(
        x,
        reference.pack_i2s(np.zeros((1, 5, 4))),
        one,
        one,
        None,
        k=4,
        activation_bits=bits,
        activation_scale=static,
    )
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_matmul_worked_by_hand():
    # W = 0.5 * [[1, 0, -1], [1, 1, 1]], x = [127, 1, 2] has inv_s = 1 and q = x.
    weight = reference.pack_i2s(np.array([[[2, 1, 0], [2, 2, 2]]]))
    half, one = np.full((1, 1, 1), 0.5, np.float32), np.ones((1, 1, 1), np.float32)
    y = reference.matmul(np.array([127.0, 1, 2], np.float32), weight, half, one, np.float32([10, 20]), k=3)
    assert y.tolist() == [72.5, 85.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block_size", [0, 16, 48])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_matmul_is_near_float_arithmetic(bits, block_size, scale_dtype, dtype):
    rng = np.random.default_rng(1)
    planes, n, k = 3, 5, 100
    groups = len(reference.group_starts(k, block_size))
    weight = reference.pack_i2s(rng.integers(0, 4, (planes, n, k)))
    scale = rng.normal(size=(planes, n, groups)).astype(scale_dtype)
    zero_point = rng.choice([1, 1.5, 0.25], (planes, n, groups)).astype(scale_dtype)
    bias = rng.normal(size=n).astype(np.float32)
    x = rng.normal(size=(2, 3, k)).astype(dtype)
    y = reference.matmul(x, weight, scale, zero_point, bias, k=k, block_size=block_size, activation_bits=bits)
    w = reference.dequantize(weight, scale, zero_point, k, block_size)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    assert (y.dtype, y.shape) == (dtype, (2, 3, n))
    bound = {8: 1.0, 16: 5e-3, 32: 2e-5}[bits] + (0.05 if dtype is np.float16 else 0)
    np.testing.assert_allclose(y, exact, rtol=0, atol=bound)


def test_scales_of_one_row_or_group_serve_all():
    rng = np.random.default_rng(2)
    weight = reference.pack_i2s(rng.integers(0, 3, (1, 4, 64)))
    x = rng.normal(size=(2, 64)).astype(np.float32)
    one = np.ones((1, 1, 1), np.float32)
    short = reference.matmul(x, weight, 3 * one, one, None, k=64, block_size=32)
    long = np.ones((1, 4, 2), np.float32)
    assert np.array_equal(short, reference.matmul(x, weight, 3 * long, long, None, k=64, block_size=32))


@pytest.mark.parametrize(
    ("ratio", "zero_points", "merged"),
    [
        ((4, 1), (2, 0), True),
        ((3, 1), (1, 1), True),
        ((64, 16, 4, 1), (2, 0, 0, 0), True),
        ((64, 16, 5, 1), (2, 0, 0, 0), False),
        ((4, 1), (1.5, -128), True),
        ((4, 1), (1.25, 1), False),
        ((4, 1), (128.5, 1), False),
        ((1, 1), (1, 1), True),
        ((1, 4), (1, 1), False),
        ((2.5, 1), (1, 1), False),
        ((-4, 1), (1, 1), False),
        ((1,), (1,), False),
    ],
)
def test_planes_in_integer_ratio_are_merged(
    ratio: tuple[float, ...], zero_points: tuple[float, ...], merged: bool
):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (len(ratio), 5, 24), np.uint8)
    scale = np.float32(ratio)[:, None, None] * rng.integers(-9, 9, (5, 3)).astype(np.float32)
    zero_point = np.float32(zero_points)[:, None, None]
    got = reference.merge_planes(codes, scale, zero_point, 8)
    assert got[0].shape == (1 if merged else len(ratio), 5, 24)
    decoded = [
        (c - np.float64(z)) * np.repeat(s, 8, axis=-1) for c, s, z in ((codes, scale, zero_point), got)
    ]
    assert np.array_equal(decoded[0].sum(axis=0), decoded[1].sum(axis=0))


def test_planes_that_are_not_exactly_in_ratio_are_not_merged():
    codes = np.ones((2, 3, 24), np.uint8)
    zero_point = np.ones((2, 1, 1), np.float32)
    scale = np.float32([[[4.0]], [[1.0]]]) * np.ones((3, 3), np.float32)
    assert len(reference.merge_planes(codes, scale, zero_point, 65536)[0]) == 1
    assert len(reference.merge_planes(codes, scale, zero_point, 65537)[0]) == 2
    for changed in (0, np.inf, np.nan, np.nextafter(np.float32(4), np.float32(5))):
        scale[0, 1, 2] = changed
        assert len(reference.merge_planes(codes, scale, zero_point, 8)[0]) == 2
    assert len(reference.merge_planes(codes, 0 * codes[:, :, :3], zero_point, 8)[0]) == 2


def test_block_hadamard_worked_by_hand():
    x = np.array([[1, 2, 3, 4, 8, 0, 0, -2]], np.float16)
    signs = np.array([1, 1, 1, 1, 1, -1, 1, -1], np.float32)
    y = reference.block_hadamard(x, signs, 4)
    assert y.dtype == np.float16
    assert y.tolist() == [[5, -1, -2, 0, 5, 3, 3, 5]]


@pytest.mark.parametrize("block_size", [1, 2, 8, 64, 512])
def test_block_hadamard_is_the_product_with_an_orthogonal_matrix(block_size: int):
    eye = np.eye(2 * block_size, dtype=np.float32)
    h = reference.block_hadamard(eye, np.ones(2 * block_size, np.float32), block_size)
    assert np.allclose(h @ h, eye, atol=1e-6)
    assert np.array_equal(h, h.T)
    assert not h[:block_size, block_size:].any()
    numbers = range(block_size)
    signs = np.array([[(-1) ** (i & j).bit_count() for j in numbers] for i in numbers], np.float32)
    assert np.array_equal(h[:block_size, :block_size], signs * np.float32(1 / np.sqrt(block_size)))


def test_attention_is_softmax_of_products():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 3, 8), (2, 9, 3, 8), (2, 9, 3, 4))
    )
    mask = rng.normal(size=(2, 1, 5, 9)).astype(np.float32)
    scores = 0.5 * np.einsum("brhi,bthi->bhrt", q.astype(np.float64), k) + mask
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = np.einsum("bhrt,bthi->brhi", weights, v)
    np.testing.assert_allclose(reference.attention(q, k, v, mask, 0.5), expected, rtol=1e-6, atol=1e-6)


def test_attention_to_nothing_is_zero():
    q, k = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 0, 3, 4), np.float32)
    assert not reference.attention(q, k, k, np.zeros((1, 1, 1, 1), np.float32), 1.0).any()


def test_exp_is_within_a_unit_in_the_last_place():
    x = -np.linspace(0, 87, 200001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    off = np.abs(reference.exp(x) - exact) / np.spacing(exact.astype(np.float32))
    assert off.max() < 0.88
    assert reference.exp(np.float32([0, -87.01, -1e9, -np.inf])).tolist() == [1, 0, 0, 0]
    assert np.isnan(reference.exp(np.float32([np.nan]))).all()


def test_fma_rounds_once():
    """Among them sums that are in the middle of two floats but for bits that float64 does not hold."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3000)).astype(np.float32)
    c = (rng.normal(size=3000) * 2.0 ** rng.integers(-40, 40, 3000)).astype(np.float32)
    middle = np.float32([1 + 2**-23, 1 - 2**-23]), np.float32([2**-24, 2**-24]), np.float32([1, 1 + 2**-23])
    a, b, c = (np.concatenate(pair) for pair in zip((a, b, c), middle, strict=True))
    for got, x, y, z in zip(reference.fma(a, b, c).tolist(), *(v.tolist() for v in (a, b, c)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        off = abs(Fraction(got) - exact)
        for other in np.nextafter(np.float32(got), np.float32([-np.inf, np.inf])).tolist():
            assert off < abs(Fraction(other) - exact) or np.float32(got).view(np.int32) % 2 == 0
            assert off <= abs(Fraction(other) - exact)
