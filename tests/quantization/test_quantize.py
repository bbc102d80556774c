"""Weights to codes and scales: equal to the oracle, lossless where it says so, errors for what cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnx_bitnet import _native, reference
from onnx_bitnet.errors import ModelError, RecipeError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.granularity import block_size
from onnx_bitnet.quantization import scales
from onnx_bitnet.quantization.detect import check_weight, detect
from onnx_bitnet.quantization.quantize import quantize, quantize_layer
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
GRANULARITIES = ("tensor", "channel", "block:32", "block:48", "block:128")
ROUNDINGS = ("absmean", "twn", "mse")
MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-8, 8, width=16),
)


def normal(shape, dtype=np.float32, seed=0, size=0.05):
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def squared_error(weight, packed):
    return np.sum((weight.astype(np.float64) - packed.dequantize()) ** 2)


def decode(packed):
    return reference.dequantize(packed.weight, packed.scale, packed.zero_point, packed.k, packed.block_size)


# ---- equal to the oracle


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_scales_equal_the_oracle(granularity, rounding, levels, planes, dtype):
    weight = normal((37, 145), dtype)
    weight[5] = 0
    spec = LayerSpec(granularity=granularity, rounding=rounding, levels=levels, planes=planes)
    packed = quantize_layer(weight, spec)
    codes, scale = reference.quantize_weight(
        weight.astype(np.float32),
        granularity,
        rounding,
        levels=levels,
        planes=planes,
        scale_type=packed.scale.dtype.type,
    )
    assert packed.granularity == granularity
    assert np.array_equal(packed.scale, scale)
    assert np.array_equal(packed.codes(), codes)
    assert (packed.zero_point == 1).all()
    assert np.array_equal(packed.dequantize(), decode(packed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", TYPES)
def test_integers_equal_the_oracle(granularity, bits, dtype):
    weight = normal((9, 145), dtype)
    weight[5] = 0
    packed = quantize_layer(weight, LayerSpec(granularity=granularity, integer_bits=bits))
    codes, scale, zero_point = reference.quantize_integer(
        weight.astype(np.float32), granularity, bits, packed.scale.dtype.type
    )
    assert np.array_equal(packed.scale, scale)
    assert np.array_equal(packed.zero_point, zero_point)
    assert np.array_equal(packed.codes(), codes)
    assert np.array_equal(packed.dequantize(), decode(packed))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", [*ROUNDINGS, "int4", "int8"])
def test_codes_are_chosen_for_scales_of_the_type_asked_for(rounding, granularity, name):
    weight = normal((9, 160), size=0.5)
    bits = {"int4": 4, "int8": 8}.get(rounding, 0)
    spec = LayerSpec(granularity=granularity, scale_type=name)
    kind = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name).type
    if bits:
        packed = quantize_layer(weight, replace(spec, integer_bits=bits))
        codes, scale, _ = reference.quantize_integer(weight, granularity, bits, kind)
    else:
        packed = quantize_layer(weight, replace(spec, rounding=rounding))
        codes, scale = reference.quantize_weight(weight, granularity, rounding, scale_type=kind)
    assert packed.scale.dtype == (np.float32 if name == "float32" else np.float16)
    assert packed.zero_point.dtype == packed.scale.dtype
    assert np.array_equal(packed.scale.astype(np.float32), scale.astype(np.float32))
    assert np.array_equal(packed.scale.astype(kind).astype(np.float32), packed.scale.astype(np.float32))
    assert np.array_equal(packed.codes(), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_integers_use_their_full_range(bits):
    """-2^(bits - 1) to 2^(bits - 1) - 1, with a scale that is given or fitted."""
    integers = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float32)
    for sign in (1, -1) if bits == 2 else (1,):
        weight = sign * np.float32(0.5) * np.tile(integers, (3, 2))
        spec = LayerSpec(granularity="channel", levels=4)
        if bits > 2:
            spec = LayerSpec(integer_bits=bits, granularity="tensor", scale=(0.5,))
        packed = quantize_layer(weight, spec)
        assert packed.lossless
        assert np.array_equal(packed.dequantize(), weight)


@pytest.mark.parametrize("shape", [(6, 96), (7, 100), (3, 20)])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rounding", ["mse", "twn", "absmean", "int4"])
@pytest.mark.parametrize(("rows", "size"), [(2, 16), (4, 48)])
def test_blocks_of_several_outputs_are_one_group(rounding, rows, size, planes, shape):
    weight = normal(shape)
    spec = LayerSpec(granularity=f"block:{rows}x{size}", planes=planes, scale_type="float32")
    if rounding == "int4":
        packed = quantize_layer(weight, replace(spec, integer_bits=4))
    else:
        packed = quantize_layer(weight, replace(spec, rounding=rounding))
    assert packed.scale.shape[1:] == (shape[0], -(-shape[1] // size))
    step = packed.block_size or shape[1]
    for top, left in itertools.product(range(0, shape[0], rows), range(0, shape[1], step)):
        part = (slice(top, top + rows), slice(left, left + step))
        tile = np.zeros((rows, min(size, -(-shape[1] // 16) * 16)), np.float32)
        inside = weight[part]
        tile[: inside.shape[0], : inside.shape[1]] = inside
        if rounding == "int4":
            codes, scale, _ = reference.quantize_integer(tile.reshape(1, -1), "tensor", 4)
        else:
            codes, scale = reference.quantize_weight(tile.reshape(1, -1), "tensor", rounding, planes=planes)
        codes = codes.reshape(-1, *tile.shape)[:, : inside.shape[0], : inside.shape[1]]
        assert (packed.scale[:, top : top + rows, left // step] == scale[:, :, 0]).all()
        assert np.array_equal(packed.codes()[:, *part], codes)
    assert np.array_equal(packed.dequantize(), decode(packed))


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_scales_that_a_type_cannot_hold_are_float32(bits):
    for size in (1e-6, 1e6):
        spec = LayerSpec(granularity="channel", integer_bits=bits, scale_type="float16")
        assert quantize_layer(normal((4, 64), size=size), spec).scale.dtype == np.float32
        packed = quantize_layer(normal((4, 64), size=size), replace(spec, scale_type="bfloat16"))
        assert packed.scale.dtype == np.float32
        assert np.array_equal(packed.scale.astype(ml_dtypes.bfloat16).astype(np.float32), packed.scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["auto", "float32", "float16", "bfloat16"])
def test_ternary_weights_are_lossless_whatever_the_scale_type(name, dtype):
    for granularity in ("tensor", "channel", "block:32", "block:128"):
        weight = ternary((40, 256), granularity, dtype)
        packed = quantize_layer(weight, replace(LayerSpec(scale_type=name), exact=detect(weight)))
        assert packed.lossless
        assert np.array_equal(packed.dequantize().astype(dtype), weight)
        half = name in ("float16", "bfloat16") or (name == "auto" and granularity.startswith("block"))
        if dtype is np.float16:
            assert packed.scale.dtype == (np.float16 if half else np.float32)


@pytest.mark.parametrize(("levels", "grid"), [(3, (-1, 0, 1)), (4, (-1, 0, 1, 2))])
def test_mse_is_the_optimum_over_all_codes(levels, grid):
    for seed in range(20):
        weight = normal((1, 5), seed=seed, size=1.0)
        codes = np.array(list(itertools.product(grid, repeat=5))[1:], np.float64)
        codes = codes[np.any(codes != 0, axis=1)]
        best = np.sum(weight.astype(np.float64) ** 2) - np.max(
            (codes @ weight[0]) ** 2 / np.sum(codes**2, axis=1)
        )
        for granularity in ("tensor", "channel"):
            packed = quantize_layer(weight, LayerSpec(granularity=granularity, levels=levels))
            assert squared_error(weight, packed) == pytest.approx(best, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["normal", "cauchy", "uniform", "pareto", "few", "skew", "tiny"])
def test_mse_is_the_oracles_on_all_kinds_of_weights(kind, dtype, levels):
    rng = np.random.default_rng(3)
    shape = (50, 300)
    weight = {
        "normal": lambda: rng.normal(size=shape),
        "cauchy": lambda: np.clip(rng.standard_cauchy(shape), -3e4, 3e4),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "pareto": lambda: np.clip(rng.pareto(2.0, shape) * rng.choice([-1, 1], shape), -3e4, 3e4),
        "few": lambda: rng.choice([0.1, -0.1, 0.25, 0.7, -0.9, 0.0], shape),
        "skew": lambda: -rng.gamma(0.5, size=shape),
        "tiny": lambda: rng.normal(size=shape) * 1e-39,
    }[kind]().astype(dtype)
    for granularity in ("tensor", "channel", "block:32"):
        steps = scales.fit_planes(
            weight, granularity, 1, {"rounding": "mse", "levels": levels, "scale_type": np.float32}
        )
        groups = reference.split(weight.astype(np.float32), granularity)
        expected = [[reference.least_squares(group, levels) for group in row] for row in groups]
        assert np.array_equal(steps[0, ..., 3], expected)


@settings(deadline=None, max_examples=60)
@given(weight=MATRICES, levels=st.sampled_from([3, 4]), granularity=st.sampled_from(GRANULARITIES))
def test_mse_is_never_worse_than_the_others(weight, levels, granularity):
    error = {}
    for rounding in ROUNDINGS:
        spec = LayerSpec(granularity=granularity, rounding=rounding, levels=levels)
        error[rounding] = squared_error(weight, quantize_layer(weight, spec))
    # Scales are rounded to float16 at worst: 2^-11 off the optimum adds at most about 2^-21 of the signal.
    slack = 2.0**-20 * np.sum(weight.astype(np.float64) ** 2) + 1e-30
    assert error["mse"] <= min(error["absmean"], error["twn"]) + slack


@settings(deadline=None, max_examples=60)
@given(weight=MATRICES, bits=st.sampled_from([4, 8]))
def test_integers_are_within_half_a_step(weight, bits):
    packed = quantize_layer(weight, LayerSpec(granularity="block:32", integer_bits=bits))
    step = np.repeat(packed.scale[-1].astype(np.float32), packed.block_size or packed.k, axis=1)[
        :, : packed.k
    ]
    # The step is rounded up, so nothing is clipped.
    assert np.all(np.abs(packed.dequantize() - weight) <= np.abs(step) * (0.5 + 2.0 ** (bits - 24)) + 1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_four_bits_have_sixteen_levels(sign):
    """What reaches as far as 8 steps on one side and 7 on the other is on them."""
    weight = sign * np.float32(0.25) * np.tile(np.arange(-8, 8, dtype=np.float32), (3, 4))
    packed = quantize_layer(weight, LayerSpec(granularity="block:32", integer_bits=4))
    assert packed.lossless
    assert (packed.scale[-1] == np.float16(sign * 0.25)).all()


def test_more_planes_leave_less():
    weight = normal((16, 256))
    errors = [squared_error(weight, quantize_layer(weight, LayerSpec(planes=p))) for p in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0] / 20


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_of_integers_have_scales_in_ratio_four_and_decode_exactly(bits):
    weight = normal((8, 256))
    for granularity in ("channel", "block:32"):
        packed = quantize_layer(weight, LayerSpec(granularity=granularity, integer_bits=bits))
        s = packed.scale.astype(np.float32)
        assert all(np.array_equal(s[p], 4 * s[p + 1]) for p in range(bits // 2 - 1))
        q = sum(
            (packed.codes()[p].astype(np.float64) - packed.zero_point[p, 0, 0]) * 4 ** (bits // 2 - 1 - p)
            for p in range(bits // 2)
        )
        step = np.repeat(s[-1], packed.block_size or packed.k, axis=1).astype(np.float64)
        assert np.array_equal(packed.dequantize().astype(np.float64), q * step)


# ---- strides and threads


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spec", [LayerSpec(), LayerSpec(granularity="tensor"), LayerSpec(integer_bits=4)])
def test_strides_do_not_change_the_result(dtype, spec):
    weight = normal((45, 130), dtype)
    buffer = np.zeros(weight.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(dtype).reshape(weight.shape)
    unaligned[...] = weight
    wide = np.zeros((90, 390), dtype)
    wide[::2, ::3] = weight
    views = {
        "transposed": np.ascontiguousarray(weight.T).T,
        "sliced": wide[::2, ::3],
        "backwards": np.ascontiguousarray(weight[::-1, ::-1])[::-1, ::-1],
        "unaligned": unaligned,
    }
    expected = quantize_layer(weight, spec)
    for name, view in views.items():
        got = quantize_layer(view, spec)
        assert np.array_equal(view, weight), name
        assert np.array_equal(got.weight, expected.weight), name
        assert np.array_equal(got.scale, expected.scale), name
        assert got.sqnr_db == expected.sqnr_db, name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [3, 60, 79, 80, 95, 150])
def test_columns_may_begin_anywhere_on_a_cache_line(dtype, n):
    weight = normal((n, 37), dtype)
    size, spec = weight.itemsize, LayerSpec(granularity="channel", rounding="absmean")
    expected = quantize_layer(weight, spec)
    for stride in (n, n + 5, -(-n // 64) * 64):  # bytes of inputs lie alike on lines, or do not
        for offset in range(64 // size):
            buffer = np.zeros(37 * stride * size + 128, np.uint8)
            start = -buffer.ctypes.data % 64 + offset * size
            columns = buffer[start : start + 37 * stride * size].view(dtype).reshape(37, stride)[:, :n].T
            columns[...] = weight
            got = quantize_layer(columns, spec)
            assert np.array_equal(got.weight, expected.weight), (stride, offset)
            assert np.array_equal(got.scale, expected.scale), (stride, offset)


def test_a_broadcast_row_is_read_once_per_output():
    weight = np.broadcast_to(np.float32([0.5, -0.5, 0, 0.5]), (6, 4))
    assert np.array_equal(quantize(weight).dequantize(), weight)


@pytest.mark.parametrize("spec", [LayerSpec(), LayerSpec(granularity="tensor", planes=2, rounding="twn")])
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_do_not_change_the_result(monkeypatch, spec, transposed):
    weight = normal((900, 130))
    weight = np.ascontiguousarray(weight.T).T if transposed else weight
    monkeypatch.setattr(scales, "_CHUNK", 10_000)
    results = []
    for threads in (1, 5):
        monkeypatch.setattr(scales, "cpus", lambda threads=threads: threads)
        results.append(quantize_layer(weight, spec))
    assert np.array_equal(results[0].weight, results[1].weight)
    assert np.array_equal(results[0].scale, results[1].scale)
    assert results[0].sqnr_db == results[1].sqnr_db
    codes, scale = reference.quantize_weight(
        weight,
        results[0].granularity,
        spec.rounding,
        planes=spec.planes,
        scale_type=results[0].scale.dtype.type,
    )
    assert np.array_equal(results[0].scale, scale)
    assert np.array_equal(results[0].codes(), codes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(levels=4, planes=2),
        LayerSpec(granularity="channel", rounding="twn"),
        LayerSpec(granularity="block:48", rounding="absmean", planes=3),
        LayerSpec(granularity="tensor", rounding="absmean", levels=4),
        LayerSpec(integer_bits=8),
    ],
)
def test_instruction_sets_do_not_change_the_result(monkeypatch, spec, transposed, dtype):
    weight = normal((70, 149), dtype)
    weight = np.ascontiguousarray(weight.T).T if transposed else weight
    results = []
    for isa in _native.allowed_isas():
        monkeypatch.setenv("ONNX_BITNET_ISA", isa)
        results.append(quantize_layer(weight, spec))
        assert np.array_equal(results[-1].dequantize(), decode(results[-1]))
    for result in results[1:]:
        assert np.array_equal(result.weight, results[0].weight)
        assert np.array_equal(result.scale, results[0].scale)
        assert (result.sqnr_db, result.zeros) == (results[0].sqnr_db, results[0].zeros)


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("ONNX_BITNET_ISA", "mmx")
    with pytest.raises(RecipeError, match="ONNX_BITNET_ISA=mmx"):
        quantize(normal((4, 32)))


# ---- lossless


def ternary(shape, granularity, dtype, seed=0):
    """Return a matrix that is exactly ternary with these groups and no coarser ones."""
    rng = np.random.default_rng(seed)
    t = rng.integers(-1, 2, shape)
    t[:, ::32] = 1  # no group is all zeros, so that groups do not merge
    size = block_size(granularity) or shape[1]
    groups = -(-shape[1] // size)
    s = rng.uniform(0.01, 0.1, (shape[0], groups))
    if granularity == "tensor":
        s[:] = 0.0317
    return (t * np.repeat(s, size, axis=1)[:, : shape[1]]).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "granularity", ["tensor", "channel", "block:256", "block:128", "block:64", "block:32"]
)
@pytest.mark.parametrize("k", [512, 700])
def test_ternary_is_found_and_lossless(granularity, dtype, k):
    weight = ternary((40, k), granularity, dtype)
    exact, expected = detect(weight), reference.find_ternary(weight)
    assert exact.block_size == expected[0] == block_size(granularity)
    assert np.array_equal(exact.scale, expected[1])
    packed = quantize(np.ascontiguousarray(weight.T).T)
    assert packed.granularity == granularity
    assert packed.lossless
    assert packed.sqnr_db is None
    assert packed.planes == 1
    assert packed.codes().max() == 2
    assert packed.zeros == np.mean(weight == 0)
    assert np.array_equal(packed.dequantize().astype(dtype), weight)
    assert np.array_equal(decode(packed).astype(dtype), weight)


def test_block_scales_are_float16_only_when_they_are_the_same_there():
    assert quantize(ternary((4, 256), "block:128", np.float16)).scale.dtype == np.float16
    assert quantize(ternary((4, 256), "block:128", np.float32)).scale.dtype == np.float32
    assert quantize(ternary((4, 256), "channel", np.float16)).scale.dtype == np.float32
    assert quantize_layer(normal((4, 256)), LayerSpec()).scale.dtype == np.float16
    assert quantize_layer(normal((4, 256), size=1e-6), LayerSpec()).scale.dtype == np.float32
    assert quantize_layer(normal((4, 256), size=1e6), LayerSpec()).scale.dtype == np.float32
    assert quantize_layer(normal((4, 256), size=1e-6), LayerSpec(integer_bits=4)).scale.dtype == np.float32


def test_negative_zeros_and_groups_of_zeros_are_ternary():
    weight = ternary((6, 96), "channel", np.float32)
    weight[weight == 0] = -0.0
    weight[2] = 0
    weight[4] = -0.0
    packed = quantize(weight)
    assert packed.lossless
    assert packed.scale[0, 2, 0] == 0
    assert (packed.codes()[0, [2, 4]] == 1).all()
    assert np.array_equal(packed.dequantize(), weight)


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_alone_are_lossless(dtype):
    packed = quantize(np.zeros((3, 5), dtype))
    assert packed.lossless
    assert packed.zeros == 1
    assert not packed.dequantize().any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("where", [(0, 0), (17, 31), (39, 95)])
def test_one_step_off_is_not_lossless(dtype, where):
    weight = ternary((40, 96), "tensor", dtype)
    bits = np.uint32 if dtype is np.float32 else np.uint16
    weight[where] = weight[0, 32]
    weight.view(bits)[where] += bits(1)
    assert detect(weight) is None
    packed = quantize(weight, Recipe(mode="ternary", granularity="tensor"))
    assert not packed.lossless
    assert packed.sqnr_db > 40
    assert reference.find_ternary(weight) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_ternary(bad):
    weight = np.ones((4, 64), np.float32)
    weight[1, 40] = bad
    assert detect(weight) is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1), (2, 31)])
def test_small_matrices_are_found_too(shape):
    weight = np.where(np.arange(np.prod(shape)).reshape(shape) % 2, 0.25, -0.25).astype(np.float32)
    assert quantize(weight).lossless
    assert np.array_equal(quantize(weight).dequantize(), weight)


@settings(deadline=None, max_examples=60)
@given(
    t=arrays.arrays(
        np.int8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=80), elements=st.integers(-1, 1)
    ),
    scale=st.floats(0.0009765625, 100, width=16),
    dtype=st.sampled_from(TYPES),
)
def test_any_ternary_matrix_survives(t, scale, dtype):
    weight = (t * np.float32(scale)).astype(dtype)
    packed = quantize(weight)
    assert packed.lossless
    assert np.array_equal(packed.dequantize().astype(dtype), weight)
    again = quantize(packed.dequantize())
    assert np.array_equal(again.weight, packed.weight)
    assert np.array_equal(again.scale, packed.scale)


@settings(deadline=None, max_examples=60)
@given(weight=MATRICES, rounding=st.sampled_from(ROUNDINGS), planes=st.integers(1, 2))
def test_lossless_means_equal(weight, rounding, planes):
    packed = quantize_layer(weight, LayerSpec(rounding=rounding, planes=planes))
    assert packed.lossless == np.array_equal(packed.dequantize(), weight)
    assert np.isfinite(packed.dequantize()).all()
    assert (packed.sqnr_db is None) == packed.lossless
    assert packed.zeros == np.mean(packed.dequantize() == 0)


def test_sqnr_is_in_decibels_of_float64():
    weight = normal((8, 200))
    packed = quantize_layer(weight, LayerSpec())
    expected = 10 * np.log10(np.sum(weight.astype(np.float64) ** 2) / squared_error(weight, packed))
    assert packed.sqnr_db == pytest.approx(expected, rel=1e-12)


# ---- the record, the recipe and the errors


def test_quantized_knows_its_size_and_decodes_rows():
    packed = quantize_layer(normal((10, 256)), LayerSpec(planes=2))
    assert packed.nbytes == 2 * (10 * 64 + 10 * 2 * 2 + 2)
    assert packed.bits_per_weight == 8 * packed.nbytes / 2560
    assert np.array_equal(packed.dequantize(slice(3, 7)), packed.dequantize()[3:7])
    assert packed.dequantize(slice(4, 4)).shape == (0, 256)
    with pytest.raises(ValueError, match="must follow one another"):
        packed.dequantize(slice(0, 8, 2))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:32"])
@pytest.mark.parametrize("source", FORMATS)
def test_formats_convert_into_each_other_without_loss(granularity, source):
    weight = normal((33, 101))
    recipe = Recipe(mode="ternary", granularity=granularity, planes=2)
    packed = quantize(weight, recipe.replace(format=source))
    assert (packed.format, packed.weight.shape[2]) == (source, FORMATS[source].row_bytes(101))
    np.testing.assert_array_equal(packed.dequantize(), quantize(weight, recipe).dequantize())
    for target in FORMATS:
        other = packed.to(target)
        np.testing.assert_array_equal(other.weight, reference.PACK[target](packed.codes()))
        np.testing.assert_array_equal(other.to(source).weight, packed.weight)
        np.testing.assert_array_equal(other.dequantize(slice(3, 30)), packed.dequantize()[3:30])
        assert (other.lossless, other.sqnr_db, other.zeros) == (packed.lossless, packed.sqnr_db, packed.zeros)


def test_what_is_not_ternary_stays_i2s():
    weight = normal((8, 64))
    with pytest.raises(
        ModelError, match="a code is not 0, 1 or 2; only i2s holds four levels; it cannot be tl2"
    ):
        quantize(weight, Recipe(mode="ternary", levels=4)).to("tl2")
    with pytest.raises(
        ModelError, match="its zero points are not 1, so it cannot be t5; only i2s can hold it"
    ):
        quantize_layer(weight, LayerSpec(integer_bits=4)).to("t5")
    with pytest.raises(ModelError, match="cannot be tl1"):
        quantize_layer(weight, LayerSpec("tl1", integer_bits=8))


@pytest.mark.parametrize(("form", "bits"), [("i2s", 2.0), ("tl1", 2.0), ("tl2", 1.70), ("t5", 1.61)])
def test_size_of_a_layer_in_each_format(form, bits):
    weight = 0.02 * np.random.default_rng(0).integers(-1, 2, (2048, 2048)).astype(np.float32)
    packed = quantize(weight, Recipe(mode="lossless", format=form))
    assert packed.lossless
    assert packed.granularity == "tensor"
    assert FORMATS[form].bits_per_weight <= packed.bits_per_weight <= bits + 1e-4
    np.testing.assert_array_equal(packed.dequantize(), weight)


def test_defaults_suit_the_bits():
    weight = normal((4, 256))
    assert quantize(weight, {"mode": "ternary"}).granularity == "block:128"
    assert quantize_layer(weight, LayerSpec(integer_bits=4)).granularity == "block:32"
    assert quantize_layer(weight, LayerSpec(integer_bits=8)).granularity == "channel"
    assert quantize_layer(weight, LayerSpec(granularity="block:256")).granularity == "channel"


def test_spec_takes_the_fields_of_a_recipe():
    recipe = Recipe(granularity="channel", rounding="twn", planes=2, levels=4, activation_bits=8)
    assert LayerSpec.from_recipe(recipe) == LayerSpec("i2s", "channel", "twn", 2, 4, 8)
    assert LayerSpec.from_recipe(Recipe()) == LayerSpec("i2s", "auto", "mse", 1, 3, 16)
    assert LayerSpec().settings != LayerSpec(levels=4).settings


def test_lossless_mode_refuses_other_weights():
    with pytest.raises(ModelError, match="not ternary, and mode 'lossless' packs nothing else"):
        quantize(normal((4, 32)), Recipe(mode="lossless"))


def test_a_wrong_recipe_is_an_error():
    with pytest.raises(RecipeError, match="rouding"):
        quantize(normal((4, 32)), {"rouding": "mse"})


@pytest.mark.parametrize("transposed", [False, True])
def test_nan_and_infinity_are_counted_and_located(transposed):
    weight = np.ones((40, 70), np.float32)
    weight[21, 3], weight[21, 69], weight[30, 0] = np.inf, np.nan, -np.inf
    weight = np.ascontiguousarray(weight.T).T if transposed else weight
    with pytest.raises(ModelError) as error:
        check_weight(weight, "head")
    assert str(error.value) == (
        "head: weight holds 3 NaN or infinite values, the first (inf) at output 21, input 3; "
        "repair the model, or keep this layer with a rule"
    )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(4, np.float32), r"weight of shape \(4,\) is not a matrix"),
        (None, r"weight of shape \(\) is not a matrix"),
        ([[1.0, 2.0]], "weight of type float64 cannot be packed; use float32"),
        (np.ones((2, 2, 2), np.float32), "is not a matrix"),
        (
            np.ones((2, 2), np.float64),
            "weight of type float64 cannot be packed; use float32, float16, bfloat16",
        ),
        (np.ones((2, 2), np.int8), "weight of type int8"),
        (np.ones((2, 2), ">f4"), "weight of type >f4"),
        (np.ones((0, 2), np.float32), r"weight of shape \(0, 2\) is empty"),
        (np.ones((2, 0), np.float16), r"weight of shape \(2, 0\) is empty"),
    ],
)
def test_what_cannot_be_packed_is_an_error(weight, message):
    with pytest.raises(ModelError, match=message):
        quantize(weight)


def test_weights_that_overflow_when_decoded_are_an_error():
    # 3.3e38 is at 7.5 steps and -3.3e38 at -7.5, which becomes -8.
    weight = np.tile(np.float32([3.3e38, -3.3e38]), (2, 16))
    with pytest.raises(ModelError, match="near the largest float32 overflow when decoded"):
        quantize_layer(weight, LayerSpec(integer_bits=4))


@pytest.mark.parametrize("size", [1e38, 1e-41])
@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:32"])
def test_extreme_weights_stay_finite(granularity, rounding, levels, size):
    weight = np.clip(normal((8, 96), size=1.0), -1.6, 1.6) * np.float32(size)
    spec = LayerSpec(granularity=granularity, rounding=rounding, levels=levels, planes=2)
    assert np.isfinite(quantize_layer(weight, spec).dequantize()).all()


def test_the_native_functions_check_their_arguments():
    weight = normal((4, 32))
    steps = np.zeros((1, 1, 1, 4), np.float32)
    packed = np.zeros((1, 4, 8), np.uint8)
    scale = np.ones((1, 1, 1), np.float32)
    for call in (
        lambda: _native.weight_nonfinite(weight, 0, 5),
        lambda: _native.weight_nonfinite(weight, 3, 2),
        lambda: _native.weight_nonfinite(weight[0], 0, 1),
        lambda: _native.weight_nonfinite(weight.astype(np.float64), 0, 1),
        lambda: _native.weight_magnitudes(weight, np.zeros((4, 2), np.float32), 0, 4),
        lambda: _native.moments(weight, steps, 16, np.zeros((4, 2, 3)), 0, 4),
        lambda: _native.moments(weight, steps, 0, np.zeros((3, 1, 3)), 0, 4),
        lambda: _native.products(weight, steps[:0], 0, np.zeros((4, 1, 2)), 0, 4),
        lambda: _native.fit(weight, steps, 0, 0, 4, rounding="mse", levels=3, scale_type=np.float32),
        lambda: _native.fit(weight, steps, 0, 0, 4, rounding="gptq", levels=3, scale_type=np.float32),
        lambda: _native.quantize(
            weight, 0, packed, scale, scale, 0, 4, rounding="twn", levels=3, scale_type=np.float32
        ),
        lambda: _native.nearest_step(1.0, levels=5, scale_type=np.float32),
        lambda: _native.nearest_step(1.0, levels=3, scale_type=np.float64),
        lambda: _native.step_of_moments(np.zeros(2), 4, rounding="twn", levels=3, scale_type=np.float32),
        lambda: _native.moments(weight, steps, 30, np.zeros((4, 2, 3)), 0, 4),
        lambda: _native.histogram_low(weight, steps, np.full(1 << 16, -1, np.int32), 0, 4),
        lambda: _native.assign(weight, steps, 0, packed[:, :, :7].copy(), scale, scale, 0, 4),
        lambda: _native.assign_integer(weight, scale[0], 0, 4, packed, scale, scale, 0, 4),
        lambda: _native.dequantize(packed, scale, scale, 33, 0, np.zeros((4, 33), np.float32), 0, 4),
        lambda: _native.dequantize(packed, scale, scale, 32, 16, np.zeros((4, 32), np.float32), 0, 4),
        lambda: _native.assign(weight[:3], steps, 0, packed, scale, scale, 0, 3),
    ):
        names = "weight|rows|magnitude|steps|out|slot|packed|scale|block_size|rounding|levels|moments"
        with pytest.raises(ValueError, match=names):
            call()
