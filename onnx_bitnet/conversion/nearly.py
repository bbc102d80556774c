"""Weights that are ternary but for rounding: what w + (q - w), as training code writes it, leaves of q."""

from __future__ import annotations

import numpy as np

from onnx_bitnet.quantization.detect import Exact

# The difference of two numbers some times larger than the result is rounded that much more coarsely.
_ULPS = 32
_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_AT_MOST = 1 / 32
_ROWS = 256


def nearly(weight: np.ndarray) -> Exact | None:
    """Find out whether a weight (N, K) is ternary, per tensor or else per output, up to rounding.

    Zeros must be exact, and all other magnitudes within 32 units in the last place of the weight's type. The
    scale is their median. Ordinary weights are quick: the search ends at the first row that does not fit.
    """
    tolerance = min(_ULPS * _EPS[weight.dtype.name], _AT_MOST)
    spans = np.empty((weight.shape[0], 3))
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        if not _agree(weight[start : start + 1], tolerance, spans[start : start + 1]):
            return None
        if not _agree(weight[rows], tolerance, spans[rows]):
            return None
    least, most, middle = spans.T
    there = most > 0
    if not there.any():
        return None
    if most.max() * (1 - tolerance) <= least[there].min():
        return Exact(0, np.full((1, 1), np.median(middle[there]), np.float32))
    return Exact(0, middle.astype(np.float32)[:, None])


def _agree(rows: np.ndarray, tolerance: float, spans: np.ndarray) -> bool:
    """Fill in least, most and median magnitude of each row, zeros aside; say whether all rows fit."""
    magnitude = np.abs(rows.astype(np.float64))
    magnitude[magnitude == 0] = np.nan
    empty = np.isnan(magnitude).all(axis=1)
    magnitude[empty] = 0
    spans[:, 0] = np.nanmin(magnitude, axis=1)
    spans[:, 1] = np.nanmax(magnitude, axis=1)
    spans[:, 2] = np.nanmedian(magnitude, axis=1)
    return bool(np.all(spans[:, 1] * (1 - tolerance) <= spans[:, 0]))
