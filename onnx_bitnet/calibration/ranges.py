"""Ranges of activations: which step static quantization should have, from the statistics of a calibration."""

from __future__ import annotations

import math

import numpy as np

from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.recipe import ACTIVATION_SCALES

METHODS = ACTIVATION_SCALES[1:]
PERCENT = 99.99
_CANDIDATES = 100


def activation_step(statistics: LayerStatistics, bits: int, method: str) -> float:
    """Return the step t of x ~ q t with integers q of 8 or 16 bits: the op's attribute activation_scale.

    Values beyond the range t * (2^(bits - 1) - 1) are clipped. The range is

    - minmax: the largest magnitude seen;
    - moving-average: the moving average of each batch's largest magnitude;
    - percentile: what 99.99 % of the magnitudes do not exceed;
    - mse: what minimizes the squared error of rounding and clipping, over the histogram;
    - kl: what loses least information: the histogram of clipped magnitudes against its own copy in
      2^(bits - 1) levels [TensorRT's calibration, S. Migacz 2017].
    """
    levels = (1 << (bits - 1)) - 1
    if statistics.absmax == 0:
        return 1.0 / levels
    match method:
        case "minmax":
            reach = statistics.absmax
        case "moving-average":
            reach = statistics.moving_absmax
        case "percentile":
            reach = statistics.magnitude_percentile(PERCENT)
        case "mse":
            reach = _least_error(statistics, levels)
        case "kl":
            reach = _least_divergence(statistics, levels)
        case _:
            raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return float(max(reach, 1e-5) / levels)


def _least_error(statistics: LayerStatistics, levels: int) -> float:
    """Try ranges from 1 to 100 % of the largest magnitude."""
    counts = statistics.magnitudes()
    width = statistics.histogram_range / counts.size
    values = (np.arange(counts.size) + 0.5) * width
    best, best_error = statistics.absmax, math.inf
    for share in range(_CANDIDATES, 0, -1):
        reach = statistics.absmax * share / _CANDIDATES
        step = reach / levels
        if step < width:  # 16 bits: too fine for the histogram, but then errors are spread evenly
            inside = np.full_like(values, step**2 / 12)
        else:
            inside = (values - np.rint(values / step) * step) ** 2 + width**2 / 12
        error = float(counts @ np.where(values > reach, (values - reach) ** 2, inside))
        if error < best_error:
            best, best_error = reach, error
    return best


def _least_divergence(statistics: LayerStatistics, levels: int) -> float:
    """Try ranges of whole bins; those of no more bins than levels lose nothing but what they clip."""
    counts = statistics.magnitudes().astype(np.float64)
    counts[0] = min(
        counts[0], counts[1]
    )  # zeros, such as Relu's, are exact whatever the range: they say nothing
    used = int(np.flatnonzero(counts)[-1]) + 1
    width = statistics.histogram_range / counts.size
    best, best_divergence = statistics.absmax, math.inf
    for bins in np.unique(np.linspace(min(levels + 1, used), used, _CANDIDATES).astype(int)):
        clipped = counts[:bins].copy()
        clipped[-1] += counts[bins:].sum()
        divergence = _divergence(clipped, _coarse(counts[:bins], levels + 1))
        if divergence < best_divergence:
            best, best_divergence = min(bins * width, statistics.absmax), divergence
    return best


def _coarse(counts: np.ndarray, levels: int) -> np.ndarray:
    """Spread the counts of each level evenly over those of its bins that are not empty."""
    level = np.arange(counts.size) * min(levels, counts.size) // counts.size
    there = counts > 0
    total = np.bincount(level, counts)
    share = total / np.maximum(np.bincount(level, there), 1)
    return np.where(there, share[level], 0)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of q from p; where q is 0 and p is not, q counts as 1e-9."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    there = p > 0
    return float(p[there] @ np.log(p[there] / np.maximum(q[there], 1e-9)))
