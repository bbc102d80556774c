"""Grids: the values that the weights of a group can take, and how codes and scales spell them.

A weight at level l of its group is the sum over p of coefficient[l, p] * theta[p]. The parameters theta are
the scales of planes, or a scale and an offset; whatever the grid, they are fitted and stored in the same way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_bitnet.scale_types import clamped, limits

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a group, and how they are stored.

    Args:
        coefficient: float32 (levels, params).
        template: float32 (starts, params), parameters to start a fit from for weights of mean square 1.
        store: rounds parameters (..., params) to what scales of a type can hold, see scale_types.py.
        planes: turns levels uint8 (N, K) and stored parameters (N, G, params) into codes uint8 (P, N, K),
            scales (P, N, G) and zero points (P, 1 or N, 1 or G).
    """

    coefficient: np.ndarray
    template: np.ndarray
    store: Callable[[np.ndarray, type], np.ndarray]
    planes: Callable[[np.ndarray, np.ndarray], Planes]


@functools.cache
def free_planes(count: int, levels: int) -> Grid:
    """Planes with a scale each: codes -1, 0, 1 (levels 3), or -1, 0, 1, 2 and scales of either sign (4)."""
    steps = np.arange(-1, levels - 1)
    coefficient = np.array(list(itertools.product(steps, repeat=count)), np.float32)

    def planes(index: np.ndarray, theta: np.ndarray) -> Planes:
        codes = np.stack([index // levels ** (count - 1 - p) % levels for p in range(count)])
        return codes.astype(np.uint8), np.moveaxis(theta, -1, 0), np.ones((count, 1, 1), np.float32)

    # Each plane leaves a residual of about 0.44 of what it covers (ternary), or 0.35 (four levels).
    first = np.array(
        [(1.2 if levels == 3 else 0.9) * (0.4 if levels == 3 else 0.3) ** p for p in range(count)]
    )
    return Grid(coefficient, _starts(first, levels == 4), clamped, planes)


@functools.cache
def integers(bits: int) -> Grid:
    """Symmetric integers of 4 or 8 bits: planes of the base-4 digits of q + 2^(bits - 1)."""
    coefficient = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float32)[:, None]
    powers = np.array([4**p for p in reversed(range(bits // 2))], np.float32)

    def planes(index: np.ndarray, theta: np.ndarray) -> Planes:
        codes = np.stack([index >> power & 3 for power in range(bits - 2, -1, -2)])
        zero_point = np.zeros((bits // 2, 1, 1), np.float32)
        zero_point[0] = 2
        return codes, theta[None, ..., 0] * powers[:, None, None], zero_point

    def store(theta: np.ndarray, scale_type: type) -> np.ndarray:
        # 16 significant bits, so that s * q is exact; 4^p more must be finite.
        limit = limits(scale_type)[1] / powers[0]
        s = np.clip(clamped(theta, scale_type), -limit, limit).astype(np.float32)
        exact: np.ndarray = ((s.view(np.uint32) + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)
        return exact

    widest = {4: 3.0, 8: 4.5}[bits]
    return Grid(coefficient, _starts(np.array([widest / 2 ** (bits - 1)]), bits == 4), store, planes)


@functools.cache
def nine() -> Grid:
    """Two ternary planes 3 T1 + T2 of one scale: the integers -4 to 4."""
    coefficient = np.arange(-4, 5, dtype=np.float32)[:, None]

    def planes(index: np.ndarray, theta: np.ndarray) -> Planes:
        codes = np.stack([index // 3, index % 3])
        scale = theta[None, ..., 0] * np.array([3, 1], np.float32)[:, None, None]
        return codes, scale, np.ones((2, 1, 1), np.float32)

    def store(theta: np.ndarray, scale_type: type) -> np.ndarray:
        # Two bits less than the type has: then 3 s fits it as well.
        spare = {"float16": 15, "bfloat16": 18, "float32": 2}[np.dtype(scale_type).name]
        bits = np.ascontiguousarray(theta, np.float32).view(np.uint32)
        half, mask = np.uint32(1 << (spare - 1)), np.uint32((0xFFFFFFFF << spare) & 0xFFFFFFFF)
        return clamped(((bits + half) & mask).view(np.float32), scale_type)

    return Grid(coefficient, _starts(np.array([0.55]), False), store, planes)


@functools.cache
def affine() -> Grid:
    """Four levels s * (c - z) with a zero point z for each group."""
    coefficient = np.array([[c, 1] for c in range(4)], np.float32)

    def split(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return theta[..., 0], np.where(theta[..., 0] == 0, 0, -theta[..., 1] / theta[..., 0])

    def planes(index: np.ndarray, theta: np.ndarray) -> Planes:
        scale, zero_point = split(theta)
        return index[None], scale[None], zero_point[None].astype(np.float32)

    def store(theta: np.ndarray, scale_type: type) -> np.ndarray:
        scale, zero_point = split(theta)
        scale, zero_point = clamped(scale, scale_type), clamped(np.clip(zero_point, -100, 100), scale_type)
        return np.stack([scale, -scale * zero_point], axis=-1)

    start = np.array([[1.0, -1.5], [0.8, -1.2], [1.2, -1.8], [1.0, -1.0], [1.0, -2.0]], np.float32)
    return Grid(coefficient, start, store, planes)


def _starts(theta: np.ndarray, both_signs: bool) -> np.ndarray:
    starts = np.array([theta * factor for factor in (0.6, 0.75, 0.9, 1.0, 1.15, 1.35)], np.float32)
    return np.concatenate([starts, -starts]) if both_signs else starts
