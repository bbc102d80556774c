"""Weights as they are given: whether they can be packed, and whether they are ternary already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.errors import ModelError
from onnx_bitnet.kernels import check_environment
from onnx_bitnet.quantization import scales

WEIGHT_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Exact:
    """How a matrix is exactly ternary: each group holds only -s, 0 and s.

    Args:
        block_size: inputs that share a magnitude; 0 means all of K.
        scale: the magnitudes s, float32 (N or 1, G); 0 for a group of zeros.
    """

    block_size: int
    scale: np.ndarray


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
