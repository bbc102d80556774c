"""What the bytes of a weight mean: in our formats, in panels, and in the forms of stock ops."""

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
