"""Turn a weight matrix into packed codes and scales.

Exactly ternary matrices are found by `detect` and packed as they are; all others lose something, and the
result says how much. The arithmetic is defined in reference.py and done in C; threads share the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_bitnet import _native, scale_types
from onnx_bitnet.errors import ModelError, RecipeError
from onnx_bitnet.formats import FORMATS, Format
from onnx_bitnet.granularity import block_rows, stored_block_size
from onnx_bitnet.kernels import check_environment
from onnx_bitnet.quantization import grids, scales
from onnx_bitnet.quantization.compensate import Moments, Problem, fit
from onnx_bitnet.recipe import MEASURED_ROUNDINGS, Recipe, rotation_size

Difference = tuple[float, float, bool, int]  # sums of squared errors and weights, any difference, zeros

WEIGHT_TYPES = ("float32", "float16", "bfloat16")
_WHY_I2S = "i2s loads fastest; tl2 and t5 make smaller files, and single rows from DRAM are faster in t5"
_CODES_AT_ONCE = 1 << 20
_AUTO_ACTIVATION_BITS = {"custom": 16, "ort": 8, "simulate": 32, "float": 32}
_DEFAULT_GRANULARITY = {0: "block:128", 4: "block:32", 8: "channel"}  # by integer_bits


@dataclass(frozen=True)
class Quantized:
    """A few-bit matrix W of N outputs and K inputs: W = sum over planes of scale * (code - zero_point).

    Args:
        format: name of the canonical byte layout of `weight`, see formats.py.
        n: outputs (rows).
        k: inputs (columns).
        block_size: inputs that share a scale; 0 means all of K.
        weight: uint8 (P, N, row_bytes), canonical packed codes.
        scale: float32 or float16 (P, N or 1, G or 1) with G = ceil(K / block_size).
        zero_point: type of `scale`, shape (P, 1, 1): one for each plane; 1 for ternary; with offsets
            (P, N, G).
        lossless: `dequantize()` equals the weight it was made from, value for value, in the weight's type.
        sqnr_db: signal to noise of the weights in dB; None when lossless.
        zeros: share of the weights that decode to 0.
    """

    format: str
    n: int
    k: int
    block_size: int
    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    lossless: bool
    sqnr_db: float | None = None
    zeros: float = 0.0

    @property
    def planes(self) -> int:
        """Planes of codes."""
        return int(self.weight.shape[0])

    @property
    def granularity(self) -> str:
        """What shares a scale: `tensor`, `channel` or `block:B`."""
        if self.block_size:
            return f"block:{self.block_size}"
        return "tensor" if self.scale.shape[1] == 1 else "channel"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and, where the format has them, zero points."""
        zero_point = self.zero_point.nbytes if FORMATS[self.format].four_levels else 0
        return self.weight.nbytes + self.scale.nbytes + zero_point

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, scales and zero points included."""
        return 8 * self.nbytes / (self.n * self.k)

    def codes(self) -> np.ndarray:
        """Return the codes 0..3 as uint8 (P, N, K)."""
        return FORMATS[self.format].unpack(self.weight, self.k)

    def to(self, form: str) -> Quantized:
        """Return the same matrix in another format; nothing but its bytes changes.

        >>> quantize(np.float32([[0.5, 0, -0.5, 0.5, 0.5]])).to("t5").weight.tolist()
        [[[221]]]

        Raises:
            ModelError: it has four levels or a zero point other than 1, which only i2s holds.
        """
        target = FORMATS[form]
        if not target.four_levels and not (self.zero_point == 1).all():
            raise ModelError(
                f"weight: its zero points are not 1, so it cannot be {form}; only i2s can hold it"
            )
        try:
            weight = _recode(self.weight, self.k, FORMATS[self.format], target)
        except ValueError as error:
            raise ModelError(f"{error}; it cannot be {form}") from None
        return dataclasses.replace(self, format=form, weight=weight)

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        first, last, step = rows.indices(self.n)
        if step != 1:
            raise ValueError(f"rows {rows} must follow one another")
        out = np.empty((max(0, last - first), self.k), np.float32)
        if out.size:
            scale, zero_point = _tables(self.scale, self.zero_point, self.k, self.block_size)
            if scale.shape[1] > 1:
                scale, zero_point = scale[:, first:last], zero_point[:, first:last]
            weight = _recode(self.weight[:, first:last], self.k, FORMATS[self.format], FORMATS["i2s"])
            weight, scale, zero_point = map(np.ascontiguousarray, (weight, scale, zero_point))
            _native.dequantize(weight, scale, zero_point, self.k, self.block_size, out, 0, last - first)
        return out


@dataclass(frozen=True, eq=False)
class Exact:
    """How a matrix is exactly ternary: each group holds only -s, 0 and s.

    Args:
        block_size: inputs that share a magnitude; 0 means all of K.
        scale: the magnitudes s, float32 (N or 1, G); 0 for a group of zeros.
    """

    block_size: int
    scale: np.ndarray


@dataclass(frozen=True)
class LayerSpec:
    """How to pack one layer.

    Args:
        format: name of the byte layout, see formats.py.
        granularity: what shares a scale: `tensor`, `channel`, `block:B`, `block:RxB`, or `auto` for what
            suits the bits.
        rounding: `absmean`, `twn`, `mse`, `weighted` or `gptq`, see recipe.Recipe.
        planes: 1 to 4.
        levels: 3, 4 or 9.
        activation_bits: 8, 16 or 32; not used here, but part of the decision.
        activation_scale: the step of statically quantized activations, 0 for dynamic; likewise.
        integer_bits: 4 or 8 for symmetric integers stored as 2 or 4 planes; 0 for `planes` of `levels`.
        dynamic_int8: with target `ort`, 8-bit weights without blocks go to DynamicQuantizeMatMul.
        scale: given scales, one or one for each output; none for those that `rounding` finds.
        rotation: most of the block size of a Hadamard transform, 0 for none; the weight comes rotated.
        offset: each group has a zero point of its own.
        float_type: `fp8e4m3`, `fp8e5m2` or `fp4e2m1` for such floats in place of codes, see floats.py.
        scale_type: `auto`, `float32`, `float16` or `bfloat16`, see recipe.Recipe.
        exact: what `detect` found; then the fields from granularity to levels and integer_bits do nothing.
        format_reason: why this format, where the recipe did not name it.
    """

    format: str = "i2s"
    granularity: str = "auto"
    rounding: str = "mse"
    planes: int = 1
    levels: int = 3
    activation_bits: int = 16
    activation_scale: float = 0.0
    integer_bits: int = 0
    dynamic_int8: bool = False
    scale: tuple[float, ...] = ()
    rotation: int = 0
    offset: bool = False
    scale_type: str = "auto"
    float_type: str = ""
    exact: Exact | None = dataclasses.field(default=None, compare=False)
    format_reason: str = dataclasses.field(default="", compare=False)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LayerSpec:
        """Take the per-layer fields of a recipe; `auto` becomes i2s, mse and what suits the target."""
        bits = recipe.activation_bits
        if recipe.target == "ort" and bits == 16:
            bits = 32  # it has integer activations of 8 bits only
        return cls(
            format="i2s" if recipe.format == "auto" else recipe.format,
            granularity=recipe.granularity,
            rounding="mse" if recipe.rounding == "auto" else recipe.rounding,
            planes=2 if recipe.levels == 9 else recipe.planes,
            levels=recipe.levels,
            activation_bits=bits if isinstance(bits, int) else _AUTO_ACTIVATION_BITS[recipe.target],
            dynamic_int8=recipe.target == "ort" and recipe.activation_bits == 8,
            rotation=rotation_size(recipe.rotation),
            offset=recipe.offset,
            scale_type=recipe.scale_type,
            format_reason=_WHY_I2S if recipe.format == "auto" else "",
        )

    @property
    def settings(self) -> tuple[object, ...]:
        """What decides, together with the weight, how the packed weight looks."""
        return (
            *(self.format, self.granularity, self.rounding, self.planes, self.levels),
            *(self.integer_bits, self.dynamic_int8, self.scale, self.rotation, self.offset),
            *(self.scale_type, self.float_type),
        )

    @property
    def needs_data(self) -> bool:
        """Whether the levels can only be fitted by a rounding that has data."""
        return self.exact is None and (self.offset or self.levels == 9)

    @property
    def measured(self) -> bool:
        """Whether the weight cannot be quantized without the moments of its inputs."""
        return self.exact is None and not self.scale and self.rounding in MEASURED_ROUNDINGS

    def group_length(self, k: int) -> int:
        """Return how many of K inputs share a scale."""
        if self.exact is not None:
            return self.exact.block_size or k
        return stored_block_size(self.settled_granularity, k) or k

    def granularity_of(self, k: int) -> str:
        """What shares a scale in rows of K inputs: blocks that hold all of them are channels."""
        settled = self.settled_granularity
        in_one_block = settled.startswith("block") and not stored_block_size(settled, k)
        return "channel" if in_one_block and block_rows(settled) == 1 else settled

    @property
    def settled_granularity(self) -> str:
        """What shares a scale, with `auto` settled, for a weight that is not exactly ternary."""
        if self.granularity != "auto":
            return self.granularity
        if self.float_type:
            return "block:32" if self.float_type.startswith("fp4") else "channel"
        return _DEFAULT_GRANULARITY[self.integer_bits]


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
    check_weight(weight)
    exact = detect(weight)
    if exact is None and recipe.mode == "lossless":
        raise ModelError("weight: not ternary, and mode 'lossless' packs nothing else; use mode 'ternary'")
    spec = dataclasses.replace(LayerSpec.from_recipe(recipe), exact=exact)
    if spec.measured or spec.needs_data:
        raise RecipeError(
            "gptq, weighted, levels = 9 and offset need calibration data; use convert with data"
        )
    return quantize_layer(weight, spec)


def check_weight(weight: np.ndarray, name: str = "weight") -> None:
    """Raise ModelError unless a weight can be packed: a finite, non-empty matrix of a supported type.

    The message begins with `name`.
    """
    check_environment()
    if weight.ndim != 2:
        raise ModelError(f"{name}: weight of shape {weight.shape} is not a matrix; reshape it to (N, K)")
    if weight.dtype.name not in WEIGHT_TYPES or not weight.dtype.isnative:
        raise ModelError(
            f"{name}: weight of type {weight.dtype} cannot be packed; use {', '.join(WEIGHT_TYPES)}"
        )
    if weight.size == 0:
        raise ModelError(f"{name}: weight of shape {weight.shape} is empty; N and K must be at least 1")
    found = list(scales.over_rows(weight, lambda *rows: _native.weight_nonfinite(weight, *rows)))
    count = sum(part[0] for part in found)
    if count:
        where = next(part[1] for part in found if part[1] is not None)
        raise ModelError(
            f"{name}: weight holds {count} NaN or infinite values, the first ({weight[where]}) at "
            f"output {where[0]}, input {where[1]}; repair the model, or keep this layer with a rule"
        )


def detect(weight: np.ndarray) -> Exact | None:
    """Find out whether a weight (N, K) is exactly ternary, and with the coarsest groups that will do.

    Tried in this order: the whole matrix, each output, blocks of 256, 128, 64 and 32 inputs. Magnitudes must
    agree bit for bit; -0.0 counts as 0; a weight with NaN or infinity is not ternary. Ordinary weights are
    quick: the search ends at the first 32 inputs that do not fit.
    """
    n, k = weight.shape
    magnitude = np.empty((n, -(-k // 32)), np.float32)
    if not _native.weight_magnitudes(weight, magnitude, 0, 1):
        return None
    if not all(scales.over_rows(weight, lambda *rows: _native.weight_magnitudes(weight, magnitude, *rows))):
        return None
    for block_size in (None, 0, 256, 128, 64, 32):
        groups = _merge(magnitude, block_size)
        scale = groups.max(axis=-1)
        if np.all((groups == 0) | (groups == scale[..., None])):
            return Exact(block_size or 0, scale)
    return None


def _merge(magnitude: np.ndarray, block_size: int | None) -> np.ndarray:
    """Gather magnitudes by group: (N, G, members); None makes one group of all, 0 one per row."""
    if block_size is None:
        return magnitude.reshape(1, 1, -1)
    members = block_size // 32 or magnitude.shape[1]
    padded = np.pad(magnitude, [(0, 0), (0, -magnitude.shape[1] % members)])
    return padded.reshape(magnitude.shape[0], -1, members)


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
    rule: scales.Rule = {"rounding": spec.rounding, "levels": spec.levels, "scale_type": scale_type}
    (n, k), planes = weight.shape, spec.planes
    block_size = stored_block_size(granularity, k)
    if granularity == "tensor" or block_rows(granularity) > 1:
        steps = scales.fit_planes(weight, granularity, planes, rule)
        return None if steps is None else _pack(weight, spec, block_size, steps, scale_type)
    packed = np.empty((planes, n, FORMATS["i2s"].row_bytes(k)), np.uint8)
    scale = np.empty((planes, n, scales.group_count(weight, granularity)), np.float32)
    tables = (block_size, packed, scale, np.ones_like(scale))
    parts = list(scales.over_rows(weight, lambda *rows: _native.quantize(weight, *tables, *rows, **rule)))
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
    tables = _tables(scale, zero_point, k, block_size)
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


def _recode(weight: np.ndarray, k: int, source: Format, target: Format) -> np.ndarray:
    """Turn packed planes (P, N, bytes) into those of another format, some rows at a time."""
    if source == target:
        return weight
    recoded = np.empty((*weight.shape[:2], target.row_bytes(k)), np.uint8)
    step = max(1, _CODES_AT_ONCE // k)
    for start in range(0, weight.shape[1], step):
        rows = slice(start, start + step)
        recoded[:, rows] = target.pack(source.unpack(weight[:, rows], k))
    return recoded


def _tables(
    scale: np.ndarray, zero_point: np.ndarray, k: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bring scales and zero points to float32 (P, N or 1, G), as the decoder wants them."""
    shape = (*scale.shape[:2], -(-k // (block_size or k)))
    spread = (np.broadcast_to(values, shape) for values in (scale, zero_point))
    return tuple(np.ascontiguousarray(values, np.float32) for values in spread)  # type: ignore[return-value]
