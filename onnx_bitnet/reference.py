"""The NumPy oracle: what every format, kernel and quantizer must compute, written slowly and plainly.

Nothing here is fast, and nothing here is used to convert or run a model: tests compare all else with it.
"""

from __future__ import annotations

import numpy as np


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
    codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :k].astype(np.uint8)


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
) -> np.ndarray:
    """Compute y = Q(x) W^T + bias with W = sum over planes of scale * (code - zero_point): op MatMulI2S.

    With 8 and 16 activation bits the order of the float operations is part of the definition, so results are
    the same bits everywhere. With 32 bits this is the float64 result, rounded; kernels come close to it.

    Args:
        x: float32 or float16 (..., K).
        weight: uint8 (P, N, ceil(K / 4)), see `pack_i2s`.
        scale: float32 or float16 (P, N or 1, G or 1), G = ceil(K / block_size).
        zero_point: the same shape and type.
        bias: float32 (N,), or None for zeros.
        k: K.
        block_size: inputs that share a scale; 0 means all of K.
        activation_bits: 8, 16, or 32 for float activations.
        activation_scale: the step of static quantization, 0 for dynamic.

    Returns:
        y (..., N) of the type of x.
    """
    rows = x.reshape(-1, k).astype(np.float32)
    if activation_bits == 32:
        y = _matmul_float(rows, weight, scale, zero_point, block_size)
    else:
        q, inv_s = quantize_rows(rows, activation_bits, activation_scale)
        y = _matmul_integer(q, inv_s, weight, scale, zero_point, block_size)
    if bias is not None:
        y = y + bias.astype(np.float32)
    with np.errstate(over="ignore"):
        return y.astype(x.dtype).reshape(*x.shape[:-1], weight.shape[1])


def _matmul_integer(
    q: np.ndarray,
    inv_s: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """Integer products per group, then the epilogue in float32, operation by operation."""
    k = q.shape[1]
    starts = group_starts(k, block_size)
    scale, zero_point = (_spread(a, weight, k, block_size) for a in (scale, zero_point))
    y = np.zeros((q.shape[0], weight.shape[1]), np.float32)
    for p in range(weight.shape[0]):
        codes = unpack_i2s(weight[p], k)
        for g, start in enumerate(starts):
            stop = min(k, start + (block_size or k))
            # Exact: every partial sum is an integer far below 2^53.
            acc = q[:, start:stop].astype(np.float64) @ codes[:, start:stop].astype(np.float64).T
            total = q[:, start:stop].sum(axis=1, dtype=np.float64)
            term = (acc - zero_point[p, :, g].astype(np.float64) * total[:, None]).astype(np.float32)
            if len(starts) == 1:
                y += term * (inv_s[:, None] * scale[p, :, g])
            else:
                y += term * scale[p, :, g]
    return y if len(starts) == 1 else y * inv_s[:, None]


def _matmul_float(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, block_size: int
) -> np.ndarray:
    """Float activations; a row that holds NaN or Inf gives a row of NaN."""
    k = x.shape[1]
    scale, zero_point = (
        np.repeat(_spread(a, weight, k, block_size), block_size or k, axis=2)[..., :k].astype(np.float64)
        for a in (scale, zero_point)
    )
    w = (scale * (unpack_i2s(weight, k) - zero_point)).sum(axis=0)
    finite = np.isfinite(x).all(axis=1)[:, None]
    y = np.where(finite, x, np.float32(0)).astype(np.float64) @ w.T
    return np.where(finite, y, np.nan).astype(np.float32)


def dequantize(
    weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, k: int, block_size: int = 0
) -> np.ndarray:
    """Decode packed planes to float32 (N, K); the planes are added in order, in float32.

    Arguments as for `matmul`.
    """
    codes = unpack_i2s(weight, k).astype(np.float32)
    scale, zero_point = (
        np.repeat(_spread(a, weight, k, block_size), block_size or k, axis=2)[..., :k]
        for a in (scale, zero_point)
    )
    w = np.zeros(codes.shape[1:], np.float32)
    for p in range(codes.shape[0]):
        w += (codes[p] - zero_point[p]) * scale[p]
    return w


def group_starts(k: int, block_size: int) -> range:
    """Return the first column of each group of columns that share a scale."""
    return range(0, k, block_size or k)


def _spread(values: np.ndarray, weight: np.ndarray, k: int, block_size: int) -> np.ndarray:
    """Bring scales or zero points (P, N or 1, G or 1) to float32 (P, N, G)."""
    shape = (*weight.shape[:2], len(group_starts(k, block_size)))
    return np.broadcast_to(values.astype(np.float32), shape)
