"""The packed weight formats: what the bytes of a row mean, and who reads and writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native


@dataclass(frozen=True)
class Format:
    """A canonical byte layout of codes. It is the same on every machine, and its name is what models carry.

    Args:
        name: what recipes, reports and op attributes call it.
        op_type: the op of domain `onnx_bitnet` that multiplies with it.
        bits_per_weight: bits for one code of one plane, padding aside.
        row_bytes: bytes of one row of K codes.
        pack: codes uint8 (..., K) to bytes uint8 (..., row_bytes(K)).
        unpack: bytes uint8 (..., row_bytes(K)) and K to codes uint8 (..., K).
    """

    name: str
    op_type: str
    bits_per_weight: float
    row_bytes: Callable[[int], int]
    pack: Callable[[np.ndarray], np.ndarray]
    unpack: Callable[[np.ndarray, int], np.ndarray]


def _pack_i2s(codes: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(codes, np.uint8).reshape(-1, codes.shape[-1])
    return _native.pack_i2s(rows).reshape(*codes.shape[:-1], -1)


def _unpack_i2s(packed: np.ndarray, k: int) -> np.ndarray:
    rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1])
    return _native.unpack_i2s(rows, k).reshape(*packed.shape[:-1], k)


_I2S = Format(
    name="i2s",
    op_type="MatMulI2S",
    bits_per_weight=2.0,
    row_bytes=lambda k: -(-k // 4),
    pack=_pack_i2s,
    unpack=_unpack_i2s,
)

FORMATS = {form.name: form for form in (_I2S,)}
