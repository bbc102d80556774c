"""Statistics of the rows that a layer reads, collected batch by batch in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.quantization.rotation import ROTATION, rotation

# Bins on each side of 0: enough for a percentile of 99.99, few enough to sum up in no time.
HISTOGRAM_BINS = 2048
# Weight of the batches so far in the moving average of the largest magnitudes.
_MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What a layer reads, over all calibration data: `rows` vectors of `k` values.

    Args:
        rows: number of vectors.
        k: inputs of the layer.
        min: least value.
        max: greatest value.
        absmax: largest magnitude.
        mean: of all values.
        variance: of all values.
        kurtosis: fourth central moment over the squared variance; 3 for a normal one, 0 for constants.
        row_peak: root mean square of the largest magnitude of each row.
        rotated_row_peak: the same in the basis of a block-Hadamard transform of up to 128 inputs, or None if
            no second moments were collected, without which nothing is rotated by data.
        moving_absmax: moving average of the largest magnitude of each batch (0.9 old, 0.1 new).
        histogram: int64 (2 * HISTOGRAM_BINS,), counts of the bins of equal width from -histogram_range to it.
        histogram_range: a power of two above absmax; 0 if all values are 0.
        channel_mean: float32 (K,), mean of each input.
        channel_absmean: float32 (K,), mean magnitude of each input.
        second_moment: float32 (K, K), the sum of x x^T over all rows, or None if it was not collected.
    """

    rows: int
    k: int
    min: float
    max: float
    absmax: float
    mean: float
    variance: float
    kurtosis: float
    row_peak: float
    rotated_row_peak: float | None
    moving_absmax: float
    histogram: np.ndarray
    histogram_range: float
    channel_mean: np.ndarray
    channel_absmean: np.ndarray
    second_moment: np.ndarray | None = None

    def percentile(self, percent: float) -> float:
        """Return the value below which this percentage of all values lies, linear within a bin."""
        return self._quantile(self.histogram, -self.histogram_range, percent, self.min, self.max)

    def magnitude_percentile(self, percent: float) -> float:
        """Return the magnitude below which this percentage of all magnitudes lies, linear within a bin."""
        return self._quantile(self.magnitudes(), 0.0, percent, 0.0, self.absmax)

    def magnitudes(self) -> np.ndarray:
        """Return the histogram of magnitudes: int64 (HISTOGRAM_BINS,) bins from 0 to histogram_range."""
        folded: np.ndarray = self.histogram[HISTOGRAM_BINS:] + self.histogram[HISTOGRAM_BINS - 1 :: -1]
        return folded

    def _quantile(
        self, counts: np.ndarray, start: float, percent: float, least: float, greatest: float
    ) -> float:
        if not 0 <= percent <= 100:
            raise ValueError(f"percent is {percent}, expected 0 to 100")
        below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        edges = start + np.arange(counts.size + 1) * (self.histogram_range / HISTOGRAM_BINS)
        index = min(int(np.searchsorted(below, percent / 100, side="right")), counts.size) - 1
        share = (percent / 100 - below[index]) / max(below[index + 1] - below[index], 1e-300)
        value = edges[index] + min(share, 1.0) * (edges[index + 1] - edges[index])
        return float(min(max(value, least), greatest))


class Collector:
    """Adds up rows; `result` gives their statistics.

    Args:
        k: values of a row.
        second_moment: collect the (K, K) matrix and the peaks of rotated rows, too.
    """

    def __init__(self, k: int, *, second_moment: bool) -> None:
        self.rows = 0
        self._k = k
        self._least, self._greatest, self._moving = math.inf, -math.inf, math.nan
        self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._range = 0.0
        self._peaks, self._rotated_peaks = 0.0, 0.0  # sums of the squares of rows' peaks
        self._rotation = rotation(k, ROTATION)
        self._histogram = np.zeros(2 * HISTOGRAM_BINS, np.int64)
        self._sum, self._abs_sum = np.zeros(k), np.zeros(k)
        self._second = np.zeros((k, k), np.float32) if second_moment else None

    def add(self, rows: np.ndarray) -> None:
        """Add the rows of one batch, float32 (rows, K).

        Raises:
            ValueError: they hold NaN or infinity, which would make every statistic worthless.
        """
        if rows.shape[0] == 0:
            return
        least, greatest = float(rows.min()), float(rows.max())
        if not (math.isfinite(least) and math.isfinite(greatest)):
            raise ValueError("holds NaN or infinity")
        absmax = max(greatest, -least)
        self._widen(absmax)
        bins_per_unit = HISTOGRAM_BINS / self._range if self._range else 0.0
        moments = _native.observe(rows, self._sum, self._abs_sum, bins_per_unit, self._histogram)
        self._moments = _merge(self._moments, (rows.size, *moments))
        self._peaks += _square_peaks(rows)
        if self._second is not None:
            self._second += rows.T @ rows
            self._rotated_peaks += _square_peaks(self._rotation.rows(rows) if self._rotation else rows)
        self._least, self._greatest = min(least, self._least), max(greatest, self._greatest)
        self._moving = absmax if not self.rows else _MOMENTUM * self._moving + (1 - _MOMENTUM) * absmax
        self.rows += rows.shape[0]

    def _widen(self, absmax: float) -> None:
        """Double the range until it holds a magnitude: each time, pairs of bins become one."""
        if absmax < self._range or absmax == 0:
            return
        wanted = math.ldexp(1.0, math.frexp(absmax)[1])  # above absmax, at most twice
        self._range = self._range or wanted  # so far all values were 0, whose bin stays
        while self._range < wanted:
            pairs = self._histogram.reshape(-1, 2).sum(axis=1)
            self._histogram[:] = 0
            quarter = HISTOGRAM_BINS // 2
            self._histogram[quarter:-quarter] = pairs
            self._range *= 2

    def result(self) -> LayerStatistics:
        """Return the statistics of at least one row."""
        count, mean, second, _, fourth = self._moments
        variance = second / count
        return LayerStatistics(
            rows=self.rows,
            k=self._k,
            min=self._least,
            max=self._greatest,
            absmax=max(self._greatest, -self._least),
            mean=mean,
            variance=variance,
            kurtosis=fourth / count / variance**2 if variance**2 > 0 else 0.0,
            row_peak=math.sqrt(self._peaks / self.rows),
            rotated_row_peak=(None if self._second is None else math.sqrt(self._rotated_peaks / self.rows)),
            moving_absmax=self._moving,
            histogram=self._histogram,
            histogram_range=self._range,
            channel_mean=(self._sum / self.rows).astype(np.float32),
            channel_absmean=(self._abs_sum / self.rows).astype(np.float32),
            second_moment=self._second,
        )


def _square_peaks(rows: np.ndarray) -> float:
    """Return the sum over rows of the square of the largest magnitude."""
    peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)
    return float(peaks @ peaks)


_Moments = tuple[float, float, float, float, float]  # count, mean, sums of powers 2 to 4 of the deviations


def _merge(a: _Moments, b: _Moments) -> _Moments:
    """Return the moments of two sets of values together [Pebay 2008, equations 2.1 and 3.1]."""
    if a[0] == 0:
        return b
    n = a[0] + b[0]
    d = b[1] - a[1]
    ab = a[0] * b[0]
    second = a[2] + b[2] + d**2 * ab / n
    third = a[3] + b[3] + d**3 * ab * (a[0] - b[0]) / n**2 + 3 * d * (a[0] * b[2] - b[0] * a[2]) / n
    fourth = (
        a[4]
        + b[4]
        + d**4 * ab * (a[0] ** 2 - ab + b[0] ** 2) / n**3
        + 6 * d**2 * (a[0] ** 2 * b[2] + b[0] ** 2 * a[2]) / n**2
        + 4 * d * (a[0] * b[3] - b[0] * a[3]) / n
    )
    return n, a[1] + d * b[0] / n, second, third, fourth
