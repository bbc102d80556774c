"""What our ops compute, operation by operation, and the weight that a packed one stands for."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from onnx_bitnet.reference.formats import UNPACK


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
