"""The types that scales are rounded to, and how: float16, bfloat16 and float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# What is called a scale type elsewhere is one of these NumPy types.
TYPES: dict[str, type] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Low bits of a float32 that a type has no room for. float32 keeps 16 significant bits where codes of up to
# 8 bits times a scale must be exact.
_DROPPED = {"float16": 13, "bfloat16": 16, "float32": 8}


def limits(scale_type: type) -> tuple[np.float32, np.float32]:
    """Return the least and the largest positive normal number of a type."""
    if scale_type is ml_dtypes.bfloat16:
        return np.float32(2.0**-126), np.float32((2 - 2.0**-7) * 2.0**127)
    found = np.finfo(scale_type)
    return np.float32(found.smallest_normal), np.float32(found.max)


def clamped(scale: np.ndarray, scale_type: type) -> np.ndarray:
    """Round to a type; what it cannot hold becomes its largest value, what is not normal in it 0."""
    least, most = limits(scale_type)
    rounded = np.clip(scale, -most, most).astype(scale_type).astype(np.float32)
    return np.where(np.abs(rounded) < least, np.float32(0), rounded)


def upwards(scale: np.ndarray, scale_type: type) -> np.ndarray:
    """Round positive float32 scales up, so that no weight is clipped that was not: see `_DROPPED`."""
    low = np.uint32((1 << _DROPPED[np.dtype(scale_type).name]) - 1)
    up: np.ndarray = ((scale.view(np.uint32) + low) & ~low).view(np.float32)
    return up


def is_held(scale: np.ndarray, scale_type: type) -> np.ndarray:
    """Return where magnitudes lie between the least and the largest normal number of a type."""
    least, most = limits(scale_type)
    held: np.ndarray = (np.abs(scale) >= least) & (np.abs(scale) <= most)
    return held


def stored(scale: np.ndarray, scale_type: type) -> np.ndarray:
    """Return scales as they are stored: float32 or float16, as the ops read no bfloat16.

    Those of bfloat16 are stored as float16 where all are the same there.
    """
    if scale_type is not ml_dtypes.bfloat16:
        return scale.astype(scale_type)
    return narrowest(scale.astype(scale_type).astype(np.float32))


def narrowest(scale: np.ndarray) -> np.ndarray:
    """Return float32 scales as float16 where all are the same there."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale) else scale
