"""Turn a weight matrix into packed codes and scales.

Exactly ternary matrices are found by `detect` and packed as they are; all others lose something, and the
result says how much. reference/weights.py defines the arithmetic, C does it, threads share the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from onnx_bitnet import _native, scale_types
from onnx_bitnet.errors import ModelError, RecipeError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.granularity import block_rows, stored_block_size
from onnx_bitnet.quantization import grids, scales
from onnx_bitnet.quantization.compensate import Moments, Problem, fit
from onnx_bitnet.quantization.detect import Exact, check_weight, detect
from onnx_bitnet.quantization.format_choice import with_format
from onnx_bitnet.quantization.quantized import Quantized, spread
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe

Difference = tuple[float, float, bool, int]  # sums of squared errors and weights, any difference, zeros


def quantize(weight: np.ndarray, recipe: Recipe | Mapping[str, Any] | None = None) -> Quantized:
    """Quantize one matrix of weights.

    A matrix that is exactly ternary per tensor, output or block loses nothing, whatever the recipe says.

    >>> packed = quantize(np.float32([[0.5, 0, -0.5, 0.5]]))
    >>> packed.lossless, packed.codes().tolist(), packed.scale.tolist()
    (True, [[[2, 1, 0, 2]]], [[[0.5]]])

    Args:
        weight: float32, float16 or bfloat16 (N, K): outputs by inputs, of any strides.
        recipe: granularity, rounding, planes, levels and format; rules and rotation do not apply, as there is
            neither a name nor anything that could rotate the inputs.

    Raises:
        ModelError: the weight is not such a matrix, is empty, holds NaN or infinity, or is not ternary and
            the recipe's mode is `lossless`.
        RecipeError: the recipe is wrong.
    """
    recipe = Recipe.parse(recipe)
    weight = np.asarray(weight)
    check_weight(weight)
    exact = detect(weight)
    if exact is None and recipe.mode == "lossless":
        raise ModelError("weight: not ternary, and mode 'lossless' packs nothing else; use mode 'ternary'")
    spec = dataclasses.replace(LayerSpec.from_recipe(recipe), exact=exact)
    spec = with_format(spec, weight.shape[0], weight.shape[1], recipe)
    if spec.measured or spec.needs_data:
        raise RecipeError(
            "gptq, weighted, levels = 9 and offset need calibration data; use convert with data"
        )
    return quantize_layer(weight, spec)


def quantize_layer(weight: np.ndarray, spec: LayerSpec, moments: Moments | None = None) -> Quantized:
    """Quantize a weight (N, K) that `check_weight` accepts.

    Scales are rounded to the spec's type when all are normal numbers there, and codes are chosen for what
    is stored; exact ones are stored in it when all are the same there. Otherwise they are float32.

    Raises:
        ModelError: the weight holds values near the largest float32, which some codes would overflow.
    """
    if spec.exact is not None:
        return _pack_exact(weight, spec, spec.exact)
    granularity = spec.granularity_of(weight.shape[1])
    if spec.measured:
        assert moments is not None
        return _quantize_measured(weight, spec, granularity, moments)
    if spec.integer_bits:
        return _quantize_integer(weight, spec, granularity)
    if spec.scale:
        given = scales.given_steps(np.array(spec.scale, np.float32)[:, None], spec.levels)
        return _pack(weight, spec, 0, given, np.float32)
    for scale_type in _scale_types(spec, granularity):
        found = _fit_and_pack(weight, spec, granularity, scale_type)
        if found is not None:
            break
    assert found is not None  # float32 holds every scale
    return found


def _fit_and_pack(
    weight: np.ndarray, spec: LayerSpec, granularity: str, scale_type: type
) -> Quantized | None:
    """Quantize by the spec's rounding; None if its type cannot hold a scale.

    A scale that belongs to one output is found in the pass that packs it.
    """
    fit: scales.Fit = {"rounding": spec.rounding, "levels": spec.levels, "scale_type": scale_type}
    (n, k), planes = weight.shape, spec.planes
    block_size = stored_block_size(granularity, k)
    if granularity == "tensor" or block_rows(granularity) > 1:
        steps = scales.fit_planes(weight, granularity, planes, fit)
        return None if steps is None else _pack(weight, spec, block_size, steps, scale_type)
    packed = np.empty((planes, n, FORMATS["i2s"].row_bytes(k)), np.uint8)
    scale = np.empty((planes, n, scales.group_count(weight, granularity)), np.float32)
    tables = (block_size, packed, scale, np.ones_like(scale))
    parts = list(scales.over_rows(weight, lambda *rows: _native.quantize(weight, *tables, *rows, **fit)))
    if not all(held for _, held in parts):
        return None
    scale = scale_types.stored(scale, scale_type)
    zero_point = np.ones((planes, 1, 1), scale.dtype)
    return _checked(spec, k, block_size, (packed, scale, zero_point), (part for part, _ in parts))


def _quantize_measured(weight: np.ndarray, spec: LayerSpec, granularity: str, moments: Moments) -> Quantized:
    exact = np.ascontiguousarray(weight, np.float32)
    problem = Problem.of(exact, moments, diagonal=spec.rounding == "weighted")
    return fitted_to(problem, weight, spec, granularity)


def fitted_to(
    problem: Problem, weight: np.ndarray, spec: LayerSpec, granularity: str, *, turns: int = 3
) -> Quantized:
    """Fit codes and scales to what the inputs do; rows that plain absmean rounding serves better get that.

    Args:
        problem: of the weight.
        weight: (N, K).
        spec: how to pack it.
        granularity: `channel` or `block:B` with B less than K.
        turns: of the fit, see compensate.py.
    """
    block_size = stored_block_size(granularity, weight.shape[1])
    scale_type = _scale_types(spec, granularity)[0]
    levels = 3 if spec.levels == 9 else spec.levels  # nine are two planes of three with one scale
    plain = quantize_layer(weight, dataclasses.replace(spec, rounding="absmean", levels=levels))
    if scale_type is np.float16:
        scale_type = plain.scale.dtype.type  # float32 where groups are too small or too large for float16
    grid = _grid(spec)
    index, theta = fit(problem, grid, block_size, scale_type, turns=turns)
    fitted = _encode_levels(weight, spec, block_size, grid.planes(index, theta), scale_type)
    if spec.offset or spec.levels == 9:
        return fitted
    worse = problem.errors(fitted.dequantize()) > problem.errors(plain.dequantize())
    if not worse.any() or plain.scale.dtype != fitted.scale.dtype:
        return fitted
    codes, scale = fitted.codes(), fitted.scale.copy()
    codes[:, worse], scale[:, worse] = plain.codes()[:, worse], plain.scale[:, worse]
    return _encode_levels(weight, spec, block_size, (codes, scale, fitted.zero_point), scale_type)


def _grid(spec: LayerSpec) -> grids.Grid:
    if spec.integer_bits:
        return grids.integers(spec.integer_bits)
    if spec.offset:
        return grids.affine()
    return grids.nine() if spec.levels == 9 else grids.free_planes(spec.planes, spec.levels)


def _encode_levels(
    weight: np.ndarray,
    spec: LayerSpec,
    block_size: int,
    planes: grids.Planes,
    scale_type: type,
) -> Quantized:
    """Pack codes that are known already, and say what they cost."""
    codes, scale, zero_point = planes
    scale = scale_types.stored(scale, scale_type)
    n, k = weight.shape
    i2s = FORMATS["i2s"]
    quantized = Quantized(
        "i2s",
        n,
        k,
        block_size,
        i2s.pack(codes),
        scale,
        zero_point.astype(scale.dtype),
        lossless=False,
    )
    parts = scales.over_rows(weight, lambda *rows: _apart(weight, quantized, slice(*rows)))
    error, signal, zeros = (sum(values) for values in zip(*parts, strict=True))
    lossless = error == 0
    sqnr_db = None if lossless else float(10 * np.log10(signal / error))
    quantized = dataclasses.replace(quantized, lossless=lossless, sqnr_db=sqnr_db, zeros=zeros / (n * k))
    return quantized.to(spec.format)


def _apart(weight: np.ndarray, quantized: Quantized, rows: slice) -> tuple[float, float, int]:
    """Return the squares of what decoded rows are off, and of the weights, and how many decode to 0."""
    decoded = quantized.dequantize(rows)
    exact = weight[rows].astype(np.float64)
    return float(((exact - decoded) ** 2).sum()), float((exact**2).sum()), int((decoded == 0).sum())


def _scale_types(spec: LayerSpec, granularity: str) -> tuple[type, ...]:
    """Return the types to try for scales, in turn; float32, which holds all, is the last."""
    if spec.scale:
        return (np.float32,)
    by_default = "float16" if granularity.startswith("block") else "float32"
    first = scale_types.TYPES[by_default if spec.scale_type == "auto" else spec.scale_type]
    return (np.float32,) if first is np.float32 else (first, np.float32)


def _pack_exact(weight: np.ndarray, spec: LayerSpec, exact: Exact) -> Quantized:
    may_be_narrow = spec.scale_type != "float32" and (exact.block_size or spec.scale_type != "auto")
    scale = scale_types.narrowest(exact.scale) if may_be_narrow else exact.scale
    return _pack(weight, spec, exact.block_size, scales.exact_steps(exact.scale), scale.dtype.type)


def _pack(
    weight: np.ndarray, spec: LayerSpec, block_size: int, steps: np.ndarray, scale_type: type
) -> Quantized:
    def assign(*planes_and_rows: Any) -> Difference:
        return _native.assign(weight, steps, block_size, *planes_and_rows)

    scale = scale_types.stored(steps[..., 3], scale_type)
    zero_point = np.ones((steps.shape[0], 1, 1), scale.dtype)
    return _encode(weight, spec, block_size, scale, zero_point, assign)


def _quantize_integer(weight: np.ndarray, spec: LayerSpec, granularity: str) -> Quantized:
    """Planes of base-4 digits of the rounded weights: see reference.quantize_integer."""
    bits, block_size = spec.integer_bits, stored_block_size(granularity, weight.shape[1])
    most: np.ndarray = np.array(spec.scale, np.float32)[:, None]
    if not spec.scale:
        most = scales.integer_steps(weight, granularity, bits)
    powers = np.array([[[4**p]] for p in reversed(range(bits // 2))], np.float32)
    for scale_type in _scale_types(spec, granularity):
        with np.errstate(over="ignore"):
            s = scale_types.upwards(most, scale_type)
            held = scale_types.is_held(np.stack([s, s * powers[0, 0, 0]]), scale_type).all(axis=0)
        if (held | (most == 0)).all():
            break
    scale = scale_types.stored(s * powers, scale_type)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(1) / s
    factor[~np.isfinite(factor)] = 0
    zero_point = np.zeros((bits // 2, 1, 1), scale.dtype)
    zero_point[0] = 2

    def assign(*planes_and_rows: Any) -> Difference:
        return _native.assign_integer(weight, factor, block_size, bits, *planes_and_rows)

    return _encode(weight, spec, block_size, scale, zero_point, assign)


def _encode(
    weight: np.ndarray,
    spec: LayerSpec,
    block_size: int,
    scale: np.ndarray,
    zero_point: np.ndarray,
    assign: Callable[..., Difference],
) -> Quantized:
    """Pack by `assign(packed, scale, zero_point, first, last)`, which also decodes and compares.

    Every weight is packed as i2s first, then brought into the format that was asked for.
    """
    n, k = weight.shape
    packed = np.empty((scale.shape[0], n, FORMATS["i2s"].row_bytes(k)), np.uint8)
    tables = spread(scale, zero_point, k, block_size)
    parts = scales.over_rows(weight, lambda *rows: assign(packed, *tables, *rows))
    return _checked(spec, k, block_size, (packed, scale, zero_point), parts)


def _checked(
    spec: LayerSpec,
    k: int,
    block_size: int,
    planes: tuple[np.ndarray, np.ndarray, np.ndarray],
    parts: Iterable[Difference],
) -> Quantized:
    """Say how i2s planes (packed, scale, zero point) differ from the weight, in the spec's format."""
    error, signal, different, zeros = (sum(values) for values in zip(*parts, strict=True))
    if not np.isfinite(error):
        raise ModelError(
            "weight: values near the largest float32 overflow when decoded; keep this layer with a rule"
        )
    lossless = not different
    sqnr_db = None if lossless else float(10 * np.log10(signal / error))
    n = planes[0].shape[1]
    quantized = Quantized("i2s", n, k, block_size, *planes, lossless, sqnr_db, zeros / (n * k))
    return quantized.to(spec.format)
