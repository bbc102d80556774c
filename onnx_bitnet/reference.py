"""The NumPy oracle: what every format, kernel and quantizer must compute, written slowly and plainly.

Nothing here is fast, and nothing here is used to convert or run a model: tests compare all else with it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def pack_i2s(codes: np.ndarray) -> np.ndarray:
    """Pack codes 0..3 four to a byte, lowest bits first; the last byte is padded with code 1.

    Args:
        codes: integers (..., K).

    Returns:
        uint8 (..., ceil(K / 4)).
    """
    pad = -codes.shape[-1] % 4
    padded = np.pad(codes.astype(np.uint8), [(0, 0)] * (codes.ndim - 1) + [(0, pad)], constant_values=1)
    return padded[..., 0::4] | padded[..., 1::4] << 2 | padded[..., 2::4] << 4 | padded[..., 3::4] << 6


def unpack_i2s(packed: np.ndarray, k: int) -> np.ndarray:
    """Return the codes uint8 (..., k) of packed bytes (..., ceil(k / 4))."""
    return _row(np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1), k)


def pack_tl1(codes: np.ndarray) -> np.ndarray:
    """Pack ternary codes in pairs 3 c0 + c1, two pairs to a byte, the first in the low bits.

    The last byte is padded with code 1, in this and in the other formats.

    Returns:
        uint8 (..., ceil(K / 4)).
    """
    pairs = _groups(codes, 4).reshape(*codes.shape[:-1], -1, 2, 2) @ [3, 1]
    return (pairs @ [1, 16]).astype(np.uint8)


def unpack_tl1(packed: np.ndarray, k: int) -> np.ndarray:
    """Return the codes uint8 (..., k) of packed bytes; ValueError for a pair above 8 or wrong padding."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    if (pairs > 8).any():
        raise ValueError("weight: a pair index is above 8")
    return _row(_digits(pairs, (3, 1)), k)


def pack_tl2(codes: np.ndarray) -> np.ndarray:
    """Pack ternary codes in triples v = 9 c0 + 3 c1 + c2 - 13.

    A row is |v| of all triples in 4 bits each, the first in the low bits; then, from a new byte on, a bit for
    each triple, lowest first, that is 1 where v < 0.

    Returns:
        uint8 (..., ceil(T / 2) + ceil(T / 8)) with T = ceil(K / 3).
    """
    v = _groups(codes, 3) @ [9, 3, 1] - 13
    magnitudes = np.pad(np.abs(v), [(0, 0)] * (v.ndim - 1) + [(0, v.shape[-1] % 2)])
    signs = np.packbits(v < 0, axis=-1, bitorder="little")
    return np.concatenate([magnitudes[..., 0::2] + 16 * magnitudes[..., 1::2], signs], axis=-1).astype(
        np.uint8
    )


def unpack_tl2(packed: np.ndarray, k: int) -> np.ndarray:
    """Return the codes uint8 (..., k); ValueError for |v| above 13, a sign of 0, or wrong padding."""
    triples = -(-k // 3)
    halves, signs = np.split(packed, [-(-triples // 2)], axis=-1)
    magnitudes = (
        np.stack([halves & 15, halves >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.int64)
    )
    negative = np.unpackbits(signs, axis=-1, bitorder="little")
    if (magnitudes > 13).any():
        raise ValueError("weight: a magnitude is above 13")
    if magnitudes[..., triples:].any() or negative[..., triples:].any():
        raise ValueError("weight: bits past the last triple are not 0")
    magnitudes, negative = magnitudes[..., :triples], negative[..., :triples]
    if (negative & (magnitudes == 0)).any():
        raise ValueError("weight: a magnitude of 0 has a sign")
    return _row(_digits(np.where(negative, 13 - magnitudes, 13 + magnitudes), (9, 3, 1)), k)


def pack_t5(codes: np.ndarray) -> np.ndarray:
    """Pack ternary codes five to a byte: c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4.

    Returns:
        uint8 (..., ceil(K / 5)).
    """
    return (_groups(codes, 5) @ [1, 3, 9, 27, 81]).astype(np.uint8)


def unpack_t5(packed: np.ndarray, k: int) -> np.ndarray:
    """Return the codes uint8 (..., k) of packed bytes; ValueError for a byte above 242 or wrong padding."""
    if (packed > 242).any():
        raise ValueError("weight: a byte is above 242")
    return _row(_digits(packed, (1, 3, 9, 27, 81)), k)


PACK = {"i2s": pack_i2s, "tl1": pack_tl1, "tl2": pack_tl2, "t5": pack_t5}
UNPACK = {"i2s": unpack_i2s, "tl1": unpack_tl1, "tl2": unpack_tl2, "t5": unpack_t5}


def pack_panels(codes: np.ndarray) -> np.ndarray:
    """Pack codes 0..3 in the order in which kernels read them: the `panel` layout.

    64 outputs and 16 inputs (a step) are 256 bytes, of which byte 4 i + j holds inputs j, 4 + j, 8 + j and
    12 + j of output i, the first in the lowest bits. Steps follow one another, then come the next 64 outputs.
    Past N and K everything is code 1.

    Args:
        codes: integers (..., N, K).

    Returns:
        uint8 (..., ceil(N / 64), 1024 * ceil(K / 16) / 4).
    """
    *planes, n, k = codes.shape
    pad = [(0, 0)] * len(planes) + [(0, -n % 64), (0, -k % 16)]
    padded = np.pad(codes.astype(np.uint8), pad, constant_values=1)
    fields = padded.reshape(*planes, padded.shape[-2] // 64, 64, padded.shape[-1] // 16, 4, 4)
    fields = np.moveaxis(fields, [-4, -2], [-3, -1])  # outputs behind steps, and fields behind bytes
    packed: np.ndarray = (fields << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8)
    return packed.reshape(*packed.shape[:-3], -1)


def unpack_panels(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """Return the codes uint8 (..., n, k) of panels; ValueError for padding other than 1."""
    fields = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    fields = fields.reshape(*packed.shape[:-1], -1, 64, 4, 4)
    codes = np.moveaxis(fields, [-3, -1], [-4, -2]).reshape(*packed.shape[:-2], 64 * packed.shape[-2], -1)
    if (codes[..., n:, :] != 1).any() or (codes[..., k:] != 1).any():
        raise ValueError("weight: a code past N or K is not 1")
    return codes[..., :n, :k]


def _groups(codes: np.ndarray, size: int) -> np.ndarray:
    """Split ternary codes (..., K) to (..., G, size), the last group filled up with 1."""
    if codes.size and codes.max() > 2:
        raise ValueError("a code is not 0, 1 or 2")
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % size)]
    return np.pad(codes.astype(np.int64), pad, constant_values=1).reshape(*codes.shape[:-1], -1, size)


def _digits(numbers: np.ndarray, powers: tuple[int, ...]) -> np.ndarray:
    """Return the base-3 digits (..., len(powers)) of numbers."""
    return numbers[..., None].astype(np.int64) // powers % 3


def _row(codes: np.ndarray, k: int) -> np.ndarray:
    """Join groups of codes (..., G, size) to rows of k; what is past k must be 1."""
    row = codes.reshape(*codes.shape[:-2], -1).astype(np.uint8)
    if (row[..., k:] != 1).any():
        raise ValueError("weight: a code past K is not 1")
    return row[..., :k]


def quantize_rows(x: np.ndarray, bits: int, static_scale: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows of activations symmetrically; x ~ q * inv_s.

    Args:
        x: float32 or float16 (M, K).
        bits: 8 or 16.
        static_scale: the step from calibration, or 0 to take each row's own.

    Returns:
        q int32 (M, K) and inv_s float32 (M,). A row that holds NaN or Inf has q = 0 and inv_s = NaN.
    """
    x = x.astype(np.float32)
    levels = np.float32(2 ** (bits - 1) - 1)
    finite = np.isfinite(x).all(axis=1)
    x = np.where(finite[:, None], x, np.float32(0))
    if static_scale:
        inv_s = np.full(x.shape[0], static_scale, np.float32)
        s = np.float32(1) / inv_s
    else:
        largest = np.maximum(np.abs(x).max(axis=1, initial=0), np.float32(1e-5))
        s = np.float32(1) / largest * levels
        inv_s = largest / levels
    with np.errstate(over="ignore"):
        q = np.clip(np.rint(x * s[:, None]), -levels - 1, levels)
    return q.astype(np.int32), np.where(finite, inv_s, np.float32(np.nan))


def matmul(
    x: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    bias: np.ndarray | None,
    *,
    k: int,
    block_size: int = 0,
    activation_bits: int = 8,
    activation_scale: float = 0.0,
    form: str = "i2s",
) -> np.ndarray:
    """Compute y = Q(x) W^T + bias with W = sum over planes of scale * (code - zero_point).

    With 8 and 16 activation bits the order of the float operations is part of the definition, so results are
    the same bits everywhere. With 32 bits this is the float64 result, rounded; kernels come close to it.

    Args:
        x: float32 or float16 (..., K).
        weight: uint8 (P, N, row_bytes), what `PACK[form]` makes of codes.
        scale: float32 or float16 (P, N or 1, G or 1), G = ceil(K / block_size).
        zero_point: likewise (P, N or 1, G or 1), on its own.
        bias: float32 (N,), or None for zeros.
        k: K.
        block_size: inputs that share a scale; 0 means all of K.
        activation_bits: 8, 16, or 32 for float activations.
        activation_scale: the step of static quantization, 0 for dynamic.
        form: format of the weight.

    Returns:
        y (..., N) of the type of x.
    """
    rows = x.reshape(-1, k).astype(np.float32)
    codes = UNPACK[form](weight, k)
    if activation_bits == 32:
        y = _matmul_float(rows, codes, scale, zero_point, block_size)
    else:
        q, inv_s = quantize_rows(rows, activation_bits, activation_scale)
        codes, scale, zero_point = merge_planes(codes, scale, zero_point, min(block_size or k, k))
        y = _matmul_integer(q, inv_s, codes, scale, zero_point, block_size)
    if bias is not None:
        y = y + bias.astype(np.float32)
    with np.errstate(over="ignore"):
        return y.astype(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


def merge_planes(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn planes whose scales are in integer ratio into the one plane that they are digits of.

    Two to four planes with scales r_p * s, where s is the last plane's, are one with codes sum(r_p * code_p)
    and zero points sum(r_p * zero_point_p), if

    - the r_p are integers >= 1, exactly and the same for all outputs and groups, and their sum is at most 85;
    - all zero points are multiples of 1/2, at most 128 in magnitude;
    - no group is longer than 65536 inputs.

    Args:
        codes: (P, N, K).
        scale: (P, N or 1, G or 1).
        zero_point: likewise, on its own.
        longest: inputs in the longest group.

    Returns:
        Codes uint8, scales and zero points float32: of one plane, or what was given.
    """
    scale, zero_point = scale.astype(np.float64), zero_point.astype(np.float64)
    apart = codes, scale.astype(np.float32), zero_point.astype(np.float32)
    s = scale[-1]
    if codes.shape[0] < 2 or longest > 65536 or not s.any():
        return apart
    with np.errstate(invalid="ignore"):
        ratio = scale[:, s != 0][:, 0] / s[s != 0][0]
    integers = (ratio >= 1).all() and (ratio == np.rint(ratio)).all() and ratio.sum() <= 85
    halves = (np.abs(zero_point) <= 128) & (2 * zero_point == np.rint(2 * zero_point))
    if not (integers and halves.all() and (scale == ratio[:, None, None] * s).all()):
        return apart
    merged = np.tensordot(ratio, codes, 1)[None].astype(np.uint8)
    return merged, apart[1][-1:], np.tensordot(ratio, zero_point, 1)[None].astype(np.float32)


def _matmul_integer(
    q: np.ndarray,
    inv_s: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """Integer products per group, then the epilogue in float32, operation by operation.

    Codes (P, N, K) with their scales and zero points, as `merge_planes` returns them.
    """
    k = q.shape[1]
    starts = group_starts(k, block_size)
    scale, zero_point = (_spread(a, codes, k, block_size) for a in (scale, zero_point))
    y = np.zeros((q.shape[0], codes.shape[1]), np.float32)
    for p, plane in enumerate(codes):
        for g, start in enumerate(starts):
            stop = min(k, start + (block_size or k))
            # Exact: every partial sum is an integer far below 2^53.
            acc = q[:, start:stop].astype(np.float64) @ plane[:, start:stop].astype(np.float64).T
            total = q[:, start:stop].sum(axis=1, dtype=np.float64)
            term = (acc - zero_point[p, :, g].astype(np.float64) * total[:, None]).astype(np.float32)
            if len(starts) == 1:
                y += term * (inv_s[:, None] * scale[p, :, g])
            else:
                y += term * scale[p, :, g]
    return y if len(starts) == 1 else y * inv_s[:, None]


def _matmul_float(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, block_size: int
) -> np.ndarray:
    """Float activations; a row that holds NaN or Inf gives a row of NaN."""
    k = x.shape[1]
    scale, zero_point = (
        np.repeat(_spread(a, codes, k, block_size), block_size or k, axis=2)[..., :k].astype(np.float64)
        for a in (scale, zero_point)
    )
    w = (scale * (codes - zero_point)).sum(axis=0)
    finite = np.isfinite(x).all(axis=1)[:, None]
    y = np.where(finite, x, np.float32(0)).astype(np.float64) @ w.T
    return np.where(finite, y, np.nan).astype(np.float32)


def block_hadamard(x: np.ndarray, signs: np.ndarray, block_size: int) -> np.ndarray:
    """Compute the normalized Walsh-Hadamard transform of x * signs in blocks of the last axis: BlockHadamard.

    The order of the float operations is part of the definition, so results are the same bits everywhere.

    Args:
        x: float32 or float16 (..., K).
        signs: float32 (K,) of 1 and -1.
        block_size: a power of two that K is a multiple of.

    Returns:
        y (..., K) of the type of x.
    """
    y: np.ndarray = x.astype(np.float32) * signs
    stride = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while stride < block_size:
            first, second = np.moveaxis(y.reshape(-1, 2, stride), 1, 0)
            y = np.stack([first + second, first - second], axis=1)
            stride *= 2
        y = y * np.float32(1 / math.sqrt(block_size))
        return y.reshape(x.shape).astype(x.dtype)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float | np.float32,
    nan_to_zero: bool = False,
) -> np.ndarray:
    """Compute softmax(scale * q k + mask) v: Attention, and with all axes 1 and 2 swapped AttentionByHead.

    The order of the float operations, which ext/kernel.h states, is part of the definition.

    Args:
        q: float32 (batch or 1, rows, heads or 1, width).
        k: float32 (batch or 1, tokens, heads or 1, width).
        v: float32 (batch or 1, tokens, heads or 1, width of y).
        mask: float32, broadcasts to (batch, heads, rows, tokens).
        scale: rounded to float32.
        nan_to_zero: a row whose weights would be NaN has zeros instead.

    Returns:
        y float32 (batch, rows, heads, width of y); zeros without tokens.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    tokens = k.shape[2]
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.zeros((*np.broadcast_shapes(q.shape[:-1], (*k.shape[:2], 1)), tokens), np.float32)
        for i in range(q.shape[3]):
            scores = fma(q[..., i, None], k[..., None, :, i], scores)
        scores = fma(scores, np.float32(scale), mask)
        p = exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        lanes = np.zeros((*p.shape[:-1], 16), np.float32)
        for first in range(0, tokens, 16):
            part = p[..., first : first + 16]
            lanes[..., : part.shape[-1]] += part
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        if nan_to_zero:
            p = np.where(np.isnan(lanes), np.float32(0), p)
            lanes = np.where(np.isnan(lanes), np.float32(1), lanes)
        y = np.zeros((*np.broadcast_shapes(p.shape[:-1], (*v.shape[:2], 1)), v.shape[3]), np.float32)
        for t in range(tokens):
            y = fma(p[..., t, None], v[..., t, None, :], y)
        factor = np.float32(1) / lanes if tokens else np.float32(1)
        return np.ascontiguousarray((y * factor).transpose(0, 2, 1, 3))


def exp(x: np.ndarray) -> np.ndarray:
    """Compute the exponential of float32 x <= 0 as attention does: at most 0.87 units in the last place off.

    Below -87 it is 0.
    """
    inside = np.maximum(np.float32(-87), x)
    shift, log2e, *ln2 = (
        np.float32(c) for c in (1.5 * 2**23, 1.44269504, -0.693145751953125, -float.fromhex("0x1.7f7d1cp-20"))
    )
    n = fma(inside, log2e, shift) - shift
    r = fma(n, ln2[1], fma(n, ln2[0], inside))
    p = np.full_like(r, float.fromhex("0x1.6a2434p-10"))
    for coefficient in ("0x1.1239e2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0"):
        p = fma(p, r, np.float32(float.fromhex(coefficient)))
    return np.where(x < -87, np.float32(0), np.ldexp(p, np.nan_to_num(n).astype(np.int32)))


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """Compute a * b + c of float32, rounded once.

    The product is exact in float64; the sum is rounded to odd there, so that rounding it again loses nothing
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    is_even = total.view(np.int64) & 1 == 0
    to_odd = np.isfinite(total) & (error != 0) & is_even
    return np.where(to_odd, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def dequantize(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    k: int,
    block_size: int = 0,
    form: str = "i2s",
) -> np.ndarray:
    """Decode packed planes to float32 (N, K); the planes are added in order, in float32.

    Arguments as for `matmul`.
    """
    codes = UNPACK[form](weight, k).astype(np.float32)
    scale, zero_point = (
        np.repeat(_spread(a, codes, k, block_size), block_size or k, axis=2)[..., :k]
        for a in (scale, zero_point)
    )
    w = np.zeros(codes.shape[1:], np.float32)
    for p in range(codes.shape[0]):
        w += (codes[p] - zero_point[p]) * scale[p]
    return w


def group_starts(k: int, block_size: int) -> range:
    """Return the first column of each group of columns that share a scale."""
    return range(0, k, block_size or k)


def _spread(values: np.ndarray, codes: np.ndarray, k: int, block_size: int) -> np.ndarray:
    """Bring scales or zero points (P, N or 1, G or 1) to float32 (P, N, G)."""
    shape = (*codes.shape[:2], len(group_starts(k, block_size)))
    return np.broadcast_to(values.astype(np.float32), shape)


def find_ternary(w: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Find the coarsest groups of which each holds only -s, 0 and s, for one magnitude s per group.

    Args:
        w: float32, float16 or bfloat16 (N, K).

    Returns:
        (0, scale (1, 1)) for the whole matrix, (0, scale (N, 1)) per output, (B, scale (N, ceil(K / B))) per
        block of 256, 128, 64 or 32 inputs; None if there are none. A group of zeros has scale 0.
    """
    w = np.abs(w.astype(np.float32))
    if not np.isfinite(w).all():
        return None
    for granularity in ("tensor", "channel", "block:256", "block:128", "block:64", "block:32"):
        groups = split(w, granularity)
        if all(len(set(group[group > 0])) <= 1 for row in groups for group in row):
            scale = np.array([[group.max() for group in row] for row in groups], np.float32)
            return _block_size(granularity), scale
    return None


def quantize_weight(
    w: np.ndarray,
    granularity: str,
    rounding: str,
    *,
    levels: int = 3,
    planes: int = 1,
    scale_type: type[np.floating] = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to planes of codes 0, 1, 2 (and 3 with four levels) that mean scale * (code - 1).

    Each plane quantizes what the planes before it left over.

    Args:
        w: float32 (N, K), finite.
        granularity: `tensor`, `channel` or `block:B`.
        rounding: `absmean`, `twn` or `mse`, see `fit_group`.
        levels: 3 or 4.
        planes: P.
        scale_type: the scales are rounded to this type before the codes are chosen.

    Returns:
        codes uint8 (P, N, K) and scale of `scale_type` (P, N or 1, G or 1).
    """
    codes, scales = [], []
    for _ in range(planes):
        plane, left, scale = [], [], []
        for row in split(w, granularity):
            steps = [fit_group(group, rounding, levels, scale_type) for group in row]
            ts = [assign(group, *step) for group, step in zip(row, steps, strict=True)]
            left += [[group - step[3] * t for group, t, step in zip(row, ts, steps, strict=True)]]
            plane += [[t + 1 for t in ts]]
            scale += [[step[3] for step in steps]]
        codes.append(_join(plane, w.shape).astype(np.uint8))
        w = _join(left, w.shape)
        scales.append(np.array(scale, scale_type))
    return np.stack(codes), np.stack(scales)


def assign(w: np.ndarray, factor: np.float32, low: np.float32, high: np.float32, _: np.float32) -> np.ndarray:
    """Return t = -1, 0, 1 or 2 for each weight of a group: where w * factor lies between -low, low, high."""
    scaled = w * factor
    above = (scaled > low).astype(np.float32) + (scaled > high).astype(np.float32)
    return above - (scaled < -low).astype(np.float32)


def fit_group(
    w: np.ndarray, rounding: str, levels: int, scale_type: type[np.floating]
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return factor, low, high (see `assign`) and scale of one group of weights, given as float32 (count,).

    - absmean: scale max(mean|w|, 1e-5), codes clamp(rint(w / scale)) [BitNet b1.58];
    - twn: zero where |w| <= 0.7 mean|w|, scale the mean of |w| of the others [Ternary Weight Networks];
    - mse: the least-squares optimum over all codes and scales.

    The fourth level, 2 * scale, serves the sign that needs it: a negative scale makes it the lowest level.
    mse takes the better sign; absmean and twn, which know no fourth level, take the sign of the largest
    magnitude. absmean then rounds and clamps to -1..2; twn draws the upper threshold at 3 times the lower
    one, as in a uniform grid, and fits the scale by least squares, of which the mean is the ternary case.
    In all of them a group of zeros has scale 0.
    """
    inf = np.float32(np.inf)
    magnitude = np.abs(w)
    if not magnitude.any():
        return np.float32(0), np.float32(0), inf, np.float32(0)
    if rounding == "mse":
        scale = _store(least_squares(w, levels), scale_type)
        size = np.abs(scale)
        return np.sign(scale), size * np.float32(0.5), size * np.float32(1.5) if levels == 4 else inf, scale
    mean = np.float32(math.fsum(magnitude) / w.size)
    sign = np.float32(-1 if levels == 4 and -w.min() > w.max() else 1)
    if rounding == "absmean":
        scale = _store(sign * max(mean, np.float32(1e-5)), scale_type)
        return np.float32(1) / scale, np.float32(0.5), np.float32(1.5) if levels == 4 else inf, scale
    low = np.float32(0.7) * mean
    high = np.float32(3) * low if levels == 4 else inf
    t = assign(w, sign, low, high, inf)
    mean_of_levels = math.fsum(sign * w * t) / max(1.0, math.fsum(t * t))
    scale = _store(sign * np.float32(mean_of_levels), scale_type)
    return sign, low, high, scale


def least_squares(w: np.ndarray, levels: int) -> np.float32:
    """Return the scale s that minimizes the sum of (w - s * t)^2 with each t the best of -1, 0, 1 (and 2).

    For given t the best s is A / B with A = sum(t w) and B = sum(t^2), and removes A^2 / B from the error.
    The best t for a given s > 0 change only where s = 2|w| (0 to +-1) and s = 2w/3 (1 to 2). So going down
    from s = inf, event by event, passes the optimum. With four levels -w is tried too: it gives negative s.
    """
    best_gain, best = -1.0, 0.0
    for sign in (1.0, -1.0)[: levels - 2]:
        v = sign * w.astype(np.float64)
        positive = v[v > 0] if levels == 4 else v[:0]
        event = np.concatenate([3 * np.abs(v), positive])
        order = np.argsort(-event, kind="stable")
        a = np.cumsum(np.concatenate([np.abs(v), positive])[order])
        b = np.cumsum(np.repeat([1.0, 3.0], [v.size, positive.size])[order])
        i = np.argmax(a * a / b)
        if a[i] * a[i] / b[i] > best_gain:
            best_gain, best = a[i] * a[i] / b[i], sign * a[i] / b[i]
    return np.float32(best)


def quantize_integer(
    w: np.ndarray, granularity: str, bits: int, scale_type: type[np.floating] = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize symmetrically to 4- or 8-bit integers q, w ~ s * q, as bits / 2 planes of two-bit codes.

    The planes are the base-4 digits of q + 2^(bits - 1), highest first, with scales s * 4^i and zero points
    2, 0, 0, 0. s is the least by which no weight is off by more than a half: max|w| / 127 with 8 bits. 4 bits
    use all levels from -8 to 7: s is the larger of max|w| / 8 and m / 7.5, m the largest magnitude of the
    other sign, and negative if max|w| is that of a positive weight, which then is at -8. Its magnitude is
    rounded up to 16 significant bits (float16: 11, bfloat16: 8) so that s * q is exact in float32.

    Returns:
        codes uint8 (P, N, K), scale (P, N or 1, G or 1) and zero_point (P, 1, 1) of `scale_type`.
    """
    top = np.float32(2 ** (bits - 1) - 1)
    groups = split(w, granularity)
    steps = np.array([[_integer_step(group, bits) for group in row] for row in groups], np.float32)
    mantissa, exponent = np.frexp(np.abs(steps).astype(np.float64))
    kept = {"float32": 16, "float16": 11, "bfloat16": 8}[np.dtype(scale_type).name]
    s = np.ldexp(np.ceil(np.ldexp(mantissa, kept)), exponent - kept).astype(np.float32)
    s = np.where(steps < 0, -s, s)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(1) / s
    factor[~np.isfinite(factor)] = 0  # zeros, or weights too small for float32 arithmetic
    q = [
        [np.clip(np.rint(group * f), -top - 1, top) for group, f in zip(row, factors, strict=True)]
        for row, factors in zip(groups, factor, strict=True)
    ]
    digits = _join(q, w.shape).astype(np.int32) + 2 ** (bits - 1)
    powers = range(bits - 2, -1, -2)
    zero_point = np.zeros((bits // 2, 1, 1), scale_type)
    zero_point[0] = 2
    return (
        np.stack([digits >> power & 3 for power in powers]).astype(np.uint8),
        np.stack([(s * 2**power).astype(scale_type) for power in powers]),
        zero_point,
    )


def _integer_step(w: np.ndarray, bits: int) -> np.float32:
    """Return the step of one group before it is rounded, see `quantize_integer`."""
    below, above = np.float32(max(-w.min(), 0)), np.float32(max(w.max(), 0))
    if bits == 8:
        return max(below, above) / np.float32(127)
    step = max(max(below, above) / np.float32(8), min(below, above) / np.float32(7.5))
    return -step if above > below else step


def dequantize_linear(weight: np.ndarray, scale: np.ndarray, block_size: int, rows: slice) -> np.ndarray:
    """Decode some outputs of a weight behind DequantizeLinear.

    Args:
        weight: (K, N), of any type.
        scale: float32 (), (N,), or (ceil(K / block_size), N) with blocks.
        block_size: inputs that share a scale; 0 for all.
        rows: which outputs.

    Returns:
        float32 (rows, K).
    """
    v = weight[:, rows].astype(np.float32)
    s = scale[..., rows] if scale.ndim else scale
    group = np.arange(len(v)) // block_size if block_size else 0
    decoded: np.ndarray = v * (s[group] if s.ndim == 2 else s)
    return decoded.T


def dequantize_nbits(weight: np.ndarray, scale: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Decode a weight of onnxruntime's MatMulNBits without zero points.

    Args:
        weight: uint8 (N, G, bytes), codes of `bits` bits, lowest first: the integer plus 2^(bits - 1).
        scale: float32 (N, G).
        bits: 2, 4 or 8.
        k: inputs K.

    Returns:
        float32 (N, K).
    """
    fields = np.unpackbits(weight, axis=-1, bitorder="little").reshape(*weight.shape[:2], -1, bits)
    codes = (fields * (1 << np.arange(bits))).sum(axis=-1)
    blocks: np.ndarray = (codes - (1 << (bits - 1))).astype(np.float32) * scale[:, :, None]
    return blocks.reshape(len(weight), -1)[:, :k]


def fit_levels(
    w: np.ndarray, importance: np.ndarray, coefficient: np.ndarray, starts: np.ndarray, rounds: int
) -> np.ndarray:
    """Return the parameters theta of a grid of levels coefficient @ theta for one group of weights.

    From each start: every weight takes its nearest level, theta solves the weighted least squares for these
    levels, and so on; of all theta on the way that of the least weighted error is kept.

    Args:
        w: float (count,).
        importance: (count,), weighs the square of what each weight is off.
        coefficient: (levels, params).
        starts: (starts, params).
        rounds: how often theta is solved for.
    """
    best, least = starts[0], math.inf
    for theta in starts.astype(np.float64):
        for _ in range(rounds + 1):
            level = np.abs(w[:, None] - coefficient @ theta).argmin(axis=1)
            error = float(importance @ (w - coefficient[level] @ theta) ** 2)
            if error < least:
                best, least = theta, error
            root = np.sqrt(importance)
            theta = np.linalg.lstsq(coefficient[level] * root[:, None], w * root)[0]
    return np.asarray(best)


def compensated(
    w: np.ndarray, h: np.ndarray, values: np.ndarray, group: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Round weights to levels, one input after the other; the inputs not rounded yet make good the error.

    This is GPTQ as published: the best change of the others is e * H^-1[j, :] / H^-1[j, j], with H^-1 that of
    the inputs that are left.

    Args:
        w: (N, K).
        h: (K, K) second moments of the inputs, damped.
        values: (N, G, levels), what the weights of a group can be.
        group: (K,).
        order: (K,) in which order the inputs are rounded.

    Returns:
        levels (N, K).
    """
    w = w.astype(np.float64)
    level = np.empty(w.shape, np.int64)
    left = list(order)
    for j in order:
        inverse = np.linalg.inv(h[np.ix_(left, left)].astype(np.float64))
        here = values[:, group[j]]
        level[:, j] = np.abs(w[:, j, None] - here).argmin(axis=1)
        error = w[:, j] - np.take_along_axis(here, level[:, j, None], axis=1)[:, 0]
        w[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        left.remove(j)
    return level


def split(w: np.ndarray, granularity: str) -> list[list[np.ndarray]]:
    """Return the groups that share a scale: [rows or 1][groups of a row] vectors."""
    if granularity == "tensor":
        return [[w.reshape(-1)]]
    size = _block_size(granularity) or w.shape[1]
    return [[row[start : start + size] for start in range(0, row.size, size)] for row in w]


def _join(groups: list[list[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([group for row in groups for group in row]).reshape(shape)


def _block_size(granularity: str) -> int:
    return int(granularity.removeprefix("block:")) if granularity.startswith("block:") else 0


def _store(scale: np.float32, scale_type: type[np.floating]) -> np.float32:
    return np.float32(scale_type(scale))
