"""Choose the scales and thresholds of a weight matrix to be quantized, as reference/weights.py defines them.

A step is what the C code needs to quantize a group of weights that share a scale: (factor, low, high, scale),
see ext/quantize.h. Steps come as float32 (P, N or 1, G, 4), with one row when all outputs share their scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.granularity import block_rows, block_size
from onnx_bitnet.machine import cpus

T = TypeVar("T")

_CHUNK = 1 << 20  # weights: about a millisecond of work
_MAX_HISTOGRAMS = 16  # at a time in memory: 1 MiB each, or 8 MiB when refined
_SLOTS = 16
_BINS = 1 << 16


class Fit(TypedDict):
    """How a group gets its step; see ext/fit.h."""

    rounding: str
    levels: int
    scale_type: type


def over_rows(
    weight: np.ndarray, work: Callable[[int, int], T], max_chunks: int | None = None
) -> Iterator[T]:
    """Yield work(first, last) for ranges of rows in order, computed by threads.

    The ranges depend on the shape alone, so results are the same on every machine.
    """
    n, k = weight.shape
    step = -(-_CHUNK // k)
    if max_chunks is not None:
        step = max(step, -(-n // max_chunks))
    step = -(-step // 64) * 64  # rows of a transposed matrix that are read together: PANEL in ext/weight.c
    if step >= n:
        yield work(0, n)
        return
    with ThreadPoolExecutor(cpus()) as pool:
        yield from pool.map(lambda first: work(first, min(n, first + step)), range(0, n, step))


def fit_planes(weight: np.ndarray, granularity: str, planes: int, fit: Fit) -> np.ndarray | None:
    """Return the steps of all planes, each fitted to what the planes before it leave.

    Scales are rounded to `scale_type` before the codes are chosen. None if one is not a normal number of it.
    """
    if granularity == "tensor":
        return _fit_tensor(weight, planes, fit)
    shared, n = block_rows(granularity), weight.shape[0]
    if shared > 1:
        weight, granularity = _laid_out(weight, granularity)
    steps = np.empty((planes, weight.shape[0], group_count(weight, granularity), 4), np.float32)
    size = block_size(granularity)
    if not all(over_rows(weight, lambda *rows: _native.fit(weight, steps, size, *rows, **fit))):
        return None
    return _shared_by(shared, steps, n, axis=1) if shared > 1 else steps


def largest(weight: np.ndarray, granularity: str) -> np.ndarray:
    """Return max|w| of each group as float32 (N or 1, G)."""
    most: np.ndarray = np.maximum(*_reach(weight, granularity))
    return most


def integer_steps(weight: np.ndarray, granularity: str, bits: int) -> np.ndarray:
    """Return the least step of each group by which no weight is off by more than a half: float32 (N or 1, G).

    8 bits: max|w| / 127. 4 bits use all 16 levels -8 to 7: the step has the sign with which the largest
    magnitude is at -8, while the largest of the other sign is at 7.5 at most.
    """
    below, above = _reach(weight, granularity)
    most: np.ndarray = np.maximum(below, above)
    if bits == 8:
        return most / np.float32(127)
    step: np.ndarray = np.maximum(most / np.float32(8), np.minimum(below, above) / np.float32(7.5))
    return np.where(above > below, -step, step)


def _reach(weight: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each group reaches below and above 0, both float32 (N or 1, G)."""
    shared = block_rows(granularity)
    if shared > 1:
        below, above = _reach(*_laid_out(weight, granularity))
        n = weight.shape[0]
        return _shared_by(shared, below, n, axis=0), _shared_by(shared, above, n, axis=0)
    groups = group_count(weight, granularity)
    moments = _moments(weight, np.empty((0, 1, groups, 4), np.float32), granularity)
    least, greatest = moments[..., 1].astype(np.float32), moments[..., 2].astype(np.float32)
    return np.maximum(-least, np.float32(0)), np.maximum(greatest, np.float32(0))


def _laid_out(weight: np.ndarray, granularity: str) -> tuple[np.ndarray, str]:
    """Lay out the R rows of each block `RxB` one behind the other, so that it becomes one of `block:R*B`.

    What is missing in the last blocks counts as zeros.
    """
    rows, size = block_rows(granularity), block_size(granularity)
    n, k = weight.shape
    size = min(size, k + -k % 16)
    padded = np.pad(weight, ((0, -n % rows), (0, -k % size)))
    blocks = padded.reshape(-1, rows, padded.shape[1] // size, size).swapaxes(1, 2)
    return np.ascontiguousarray(blocks).reshape(len(blocks), -1), f"block:{rows * size}"


def _shared_by(rows: int, values: np.ndarray, n: int, axis: int) -> np.ndarray:
    """Give each of N outputs the values of its block of `rows`."""
    return np.repeat(values, rows, axis=axis).take(range(n), axis=axis)


def group_count(weight: np.ndarray, granularity: str) -> int:
    """Return how many groups a row has."""
    k: int = weight.shape[1]
    return -(-k // (block_size(granularity) or k))


def exact_steps(scale: np.ndarray) -> np.ndarray:
    """Return the steps (1, N or 1, G, 4) that give a matrix of -scale, 0 and scale its codes."""
    return _nearest(scale, 3)[None]


def given_steps(scale: np.ndarray, levels: int) -> np.ndarray:
    """Return the steps (1, N or 1, G, 4) that take the nearest level of given scales."""
    return _nearest(scale, levels)[None]


def _nearest(scale: np.ndarray, levels: int) -> np.ndarray:
    """Return the steps that take the nearest level of scale * {-1, 0, 1} or scale * {-1, 0, 1, 2}."""
    size = np.abs(scale)
    with np.errstate(over="ignore"):
        high = size * np.float32(1.5) if levels == 4 else np.full_like(size, np.inf)
    return np.stack([np.sign(scale), size * np.float32(0.5), high, scale], axis=-1)


def _fit_tensor(weight: np.ndarray, planes: int, fit: Fit) -> np.ndarray | None:
    """Do as `fit_planes` with one scale for the whole matrix."""
    steps = np.empty((0, 1, 1, 4), np.float32)
    for _ in range(planes):
        step = _tensor_step(weight, steps, fit)
        if np.isnan(step).any():
            return None
        steps = np.concatenate([steps, step[None, None, None]])
    return steps


def _tensor_step(weight: np.ndarray, steps: np.ndarray, fit: Fit) -> np.ndarray:
    """Return the step (4,) of the next plane."""
    levels, scale_type = fit["levels"], fit["scale_type"]
    if fit["rounding"] == "mse":
        best = _least_squares_of_all(weight, steps, levels)
        return _native.nearest_step(best, levels=levels, scale_type=scale_type)
    moments = _moments(weight, steps, "tensor")[0, 0]
    step = _native.step_of_moments(moments, weight.size, **fit)
    if fit["rounding"] == "absmean" or moments[0] == 0:
        return step
    products = _products(weight, np.concatenate([steps, step[None, None, None]]))
    return _native.finish_twn(step, products, levels=levels, scale_type=scale_type)


def _moments(weight: np.ndarray, steps: np.ndarray, granularity: str) -> np.ndarray:
    """Return float64 (N or 1, G, 3): sum|r|, least and greatest r, r what the planes of `steps` leave."""
    size = block_size(granularity)
    out = np.empty((weight.shape[0], steps.shape[2], 3))
    list(over_rows(weight, lambda *rows: _native.moments(weight, steps, size, out, *rows)))
    if granularity == "tensor":
        out = np.array([[[out[..., 0].sum(), out[..., 1].min(), out[..., 2].max()]]])
    return out


def _products(weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return float64 (2,) of the last plane of `steps` (P, 1, 1, 4): see bn_products in ext/quantize.h."""
    out = np.empty((weight.shape[0], 1, 2))
    list(over_rows(weight, lambda *rows: _native.products(weight, steps, 0, out, *rows)))
    total: np.ndarray = out[:, 0].sum(axis=0)
    return total


def _least_squares_of_all(weight: np.ndarray, steps: np.ndarray, levels: int) -> float:
    """Find the optimum for a whole matrix without sorting it.

    1. Count the weights by the upper 16 bits of their float32 pattern. The sum in each bin is exact too.
    2. Find the bins in which a threshold of the optimum may lie: few, see `_undecided`.
    3. Count the weights of these bins by the lower 16 bits: now their values are known.
    4. Sweep over the known values and, for each other bin, its mean: as no threshold of the optimum cuts such
       a bin, all its weights get the same code, and count times mean is their exact sum.
    """
    parts = over_rows(
        weight, lambda *rows: np.stack(_native.histogram(weight, steps, *rows)), _MAX_HISTOGRAMS
    )
    total = sum(parts, start=np.zeros((2, _BINS), np.uint64))
    bins = np.flatnonzero(total[0])
    count, low = total[:, bins].astype(np.float64)
    base, top = _magnitude(bins << 16), _magnitude((bins << 16) + (1 << 16))
    values = _Values(base + (top - base) * (low / count / _BINS), count, bins >= _BINS // 2)
    known = (low == 0) | (count == 1)
    base, top = np.where(known, values.magnitude, base), np.where(known, values.magnitude, top)
    refine = np.flatnonzero(_undecided(base, top, values, levels) & ~known)
    swept = [values.without(refine)]
    for start in range(0, refine.size, _SLOTS):
        swept.append(_refined(weight, steps, bins[refine[start : start + _SLOTS]]))
    return _best_scale(_Values(*(np.concatenate(part) for part in zip(*swept, strict=True))), levels)


class _Values(NamedTuple):
    """Distinct weights: magnitude and how many times (float64), and whether they are negative."""

    magnitude: np.ndarray
    times: np.ndarray
    negative: np.ndarray

    def without(self, index: np.ndarray) -> _Values:
        return _Values(*(np.delete(part, index) for part in self))


def _magnitude(pattern: np.ndarray) -> np.ndarray:
    """Return the magnitudes of float32 patterns as float64; that of Inf, an upper bound, is 2^128."""
    bits = pattern & 0x7FFFFFFF
    values = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(bits == 0x7F800000, 2.0**128, values)


def _refined(weight: np.ndarray, steps: np.ndarray, bins: np.ndarray) -> _Values:
    """Return the weights in some bins by value."""
    slot = np.full(_BINS, -1, np.int32)
    slot[bins] = np.arange(bins.size)
    parts = over_rows(
        weight, lambda *rows: _native.histogram_low(weight, steps, slot, *rows), _MAX_HISTOGRAMS
    )
    count = sum(parts, start=np.zeros((bins.size, _BINS), np.uint64))
    which, low = np.nonzero(count)
    pattern = bins[which] << 16 | low
    return _Values(_magnitude(pattern), count[which, low].astype(np.float64), bins[which] >= _BINS // 2)


def _undecided(low: np.ndarray, high: np.ndarray, values: _Values, levels: int) -> np.ndarray:
    """Return which bins, of magnitudes low .. high, a threshold of the least-squares optimum may cut.

    As scale s falls, a weight joins level 1 at s = 2|w|: |w| is added to A = sum(t w), 1 to B = sum(t^2). It
    joins level 2 at s = 2w/3, which adds w and 3. At the optimum s = A / B. While s is in the range of a bin,
    bins above have joined and bins below have not: this bounds A, B and so A / B. A bin is out when no s in
    its range can equal A / B.
    """
    undecided = np.zeros(low.size, bool)
    for flip in (False, True)[: levels - 2]:
        second = np.flatnonzero(values.negative == flip) if levels == 4 else np.empty(0, np.intp)
        start = np.concatenate([2 * low, low[second] * (2 / 3)])
        stop = np.concatenate([2 * high, high[second] * (2 / 3)])
        add = np.stack([values.times * values.magnitude, values.times])
        add = np.concatenate([add, add[:, second] * [[1], [3]]], axis=1)
        joined = _sum_from(start, add, stop * (1 + 1e-9))
        possible = _sum_from(stop, add, start * (1 - 1e-9))
        with np.errstate(divide="ignore", invalid="ignore"):
            within = (joined[0] / possible[1] <= stop * (1 + 1e-9)) & (
                possible[0] >= joined[1] * start * (1 - 1e-9)
            )
        undecided |= within[: low.size]
        undecided[second] |= within[low.size :]
    return undecided


def _sum_from(key: np.ndarray, add: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return for each `at` the sum of `add` (2, count) over all key >= at."""
    order = np.argsort(key)
    sums = np.cumsum(add[:, order[::-1]], axis=1)[:, ::-1]
    return np.pad(sums, [(0, 0), (0, 1)])[:, np.searchsorted(key[order], at)]


def _best_scale(values: _Values, levels: int) -> float:
    """Sweep over values that occur `times` times each, as reference.least_squares does over single ones."""
    magnitude, count, negative = values
    best_gain, best = -1.0, 0.0
    for flip in (False, True)[: levels - 2]:
        second = (negative == flip) & (magnitude > 0) if levels == 4 else np.zeros(count.size, bool)
        event = np.concatenate([3 * magnitude, magnitude[second]])
        order = np.argsort(-event, kind="stable")
        a = np.cumsum(np.concatenate([magnitude * count, magnitude[second] * count[second]])[order])
        b = np.cumsum(np.concatenate([count, 3 * count[second]])[order])
        i = np.argmax(a * a / b)
        if a[i] * a[i] / b[i] > best_gain:
            best_gain, best = float(a[i] * a[i] / b[i]), float(-a[i] / b[i] if flip else a[i] / b[i])
    return best
