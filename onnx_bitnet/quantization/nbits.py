"""Packed weights in the layout of onnxruntime's own MatMulNBits and DynamicQuantizeMatMul."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnx_bitnet.quantization.quantized import Quantized

# Inputs that share a scale, for which onnxruntime has fast kernels of 2, 4 and 8 bits; of 2 bits from 32 on.
_BLOCKS = (128, 64, 32, 16)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Integers:
    """A matrix W = scale * q of N outputs and K inputs with small integers q.

    Args:
        q: int8 (N, K).
        scale: float32 (N or 1, G), G = ceil(K / block_size).
        block_size: inputs that share a scale; 0 means all of K.
        bits: 2, 4 or 8, the least that hold every q: -2^(bits - 1) to 2^(bits - 1) - 1.
    """

    q: np.ndarray
    scale: np.ndarray
    block_size: int
    bits: int


@dataclass(frozen=True)
class NBits:
    """A matrix as MatMulNBits wants it: codes q + 2^(bits - 1), so that no zero points are stored.

    Args:
        bits: 2, 4 or 8.
        k: inputs.
        block_size: inputs that share a scale, 16 to 128.
        weight: uint8 (N, G, block_size * bits / 8), lowest bits first.
        scale: float32 (N, G).
    """

    bits: int
    k: int
    block_size: int
    weight: np.ndarray
    scale: np.ndarray

    @property
    def n(self) -> int:
        """Outputs."""
        return int(self.weight.shape[0])

    @property
    def format(self) -> str:
        """What the report calls it."""
        return f"nbits{self.bits}"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes + self.scale.nbytes

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        packed, mask = self.weight[rows], (1 << self.bits) - 1
        digits = [packed >> shift & mask for shift in range(0, 8, self.bits)]
        q = np.stack(digits, axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32)
        weight = (q - np.float32(1 << (self.bits - 1))) * self.scale[rows, :, None]
        return np.ascontiguousarray(weight.reshape(len(packed), -1)[:, : self.k])

    @classmethod
    def pack(cls, integers: Integers) -> NBits:
        """Pack integers; scales of large groups are repeated for each block."""
        n, k = integers.q.shape
        block_size = _block_size(k, integers)
        blocks = -(-k // block_size)
        repeat = integers.block_size // block_size or blocks
        scale = np.repeat(np.broadcast_to(integers.scale, (n, integers.scale.shape[1])), repeat, axis=1)
        weight = pack(integers.q, integers.bits, block_size)
        return cls(integers.bits, k, block_size, weight, np.ascontiguousarray(scale[:, :blocks], np.float32))


@dataclass(frozen=True)
class DynamicInt8:
    """A matrix as DynamicQuantizeMatMul wants it.

    Args:
        weight: int8 (K, N).
        scale: float32 (N or 1,).
    """

    weight: np.ndarray
    scale: np.ndarray

    format = "int8"

    @property
    def n(self) -> int:
        """Outputs."""
        return int(self.weight.shape[1])

    @property
    def k(self) -> int:
        """Inputs."""
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.weight.nbytes + self.scale.nbytes

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        weight: np.ndarray = (self.weight * self.scale).T
        return weight[rows]

    @classmethod
    def pack(cls, integers: Integers) -> DynamicInt8:
        """Store integers whose scales are one for each output, or one for all."""
        return cls(np.ascontiguousarray(integers.q.T), integers.scale.reshape(-1))


def _block_size(k: int, integers: Integers) -> int:
    """Return the block that takes the fewest bytes, the largest of these, without mixing scales."""
    widest = math.gcd(integers.block_size, _BLOCKS[0])
    fast = [size for size in _BLOCKS if size <= widest and (size >= 32 or integers.bits > 2)]
    return min(fast or [widest], key=lambda size: -(-k // size) * (size * integers.bits // 8 + _SCALE_BYTES))


def pack(q: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    """Pack integers -2^(bits - 1) to 2^(bits - 1) - 1 of shape (N, K) as MatMulNBits wants them.

    Returns:
        uint8 (N, ceil(K / block_size), block_size * bits / 8): q + 2^(bits - 1), lowest bits first.
    """
    n, k = q.shape
    per_byte = 8 // bits
    codes = np.pad(q, ((0, 0), (0, -k % block_size))).astype(np.int16) + (1 << (bits - 1))
    packed = np.zeros((n, codes.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= codes[:, place::per_byte].astype(np.uint8) << np.uint8(bits * place)
    return packed.reshape(n, -1, block_size // per_byte)


def integers(quantized: Quantized) -> Integers | None:
    """Return a packed weight as small integers, or None if its planes are in no integer ratio.

    Ternary and four-level weights take 2 bits; int4 and int8 as many as their names say.
    """
    scale = quantized.scale.astype(np.float32)
    zero_point = quantized.zero_point.astype(np.float32)
    unit = scale[-1]
    ratios = [_ratio(plane, unit) for plane in scale]
    if zero_point.shape[1:] != (1, 1) or None in ratios:
        return None
    q = np.zeros((quantized.n, quantized.k), np.float32)
    for codes, ratio, zero in zip(quantized.codes(), ratios, zero_point.reshape(-1), strict=True):
        q += np.float32(ratio or 0) * (codes - zero)
    if not np.array_equal(q, np.rint(q)):
        return None
    least, most = q.min(), q.max()
    for bits in (2, 4, 8):
        half = 1 << (bits - 1)
        if -half <= least and most < half:
            return Integers(q.astype(np.int8), unit, quantized.block_size, bits)
        if -half <= -most and -least < half:
            return Integers((-q).astype(np.int8), -unit, quantized.block_size, bits)
    return None


def _ratio(scale: np.ndarray, unit: np.ndarray) -> float | None:
    """Return the integer that `scale` is of `unit` everywhere."""
    used = unit != 0
    if not used.any():
        return 0.0
    ratio = np.rint(scale[used][0] / unit[used][0])
    return float(ratio) if np.array_equal(scale, unit * ratio) else None
