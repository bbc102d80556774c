"""Which codes and scales, or levels of a grid, stand for float weights."""

from __future__ import annotations

import math

import numpy as np


def find_ternary(w: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Find the coarsest groups of which each holds only -s, 0 and s, for one magnitude s per group.

    Args:
        w: float32, float16 or bfloat16 (N, K).

    Returns:
        (0, scale (1, 1)) for the whole matrix, (0, scale (N, 1)) per output, (B, scale (N, ceil(K / B))) per
        block of 256, 128, 64 or 32 inputs; None if there are none. A group of zeros has scale 0.
    """
    w = np.abs(w.astype(np.float32))
    if not np.isfinite(w).all():
        return None
    for granularity in ("tensor", "channel", "block:256", "block:128", "block:64", "block:32"):
        groups = split(w, granularity)
        if all(len(set(group[group > 0])) <= 1 for row in groups for group in row):
            scale = np.array([[group.max() for group in row] for row in groups], np.float32)
            return _block_size(granularity), scale
    return None


def quantize_weight(
    w: np.ndarray,
    granularity: str,
    rounding: str,
    *,
    levels: int = 3,
    planes: int = 1,
    scale_type: type[np.floating] = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to planes of codes 0, 1, 2 (and 3 with four levels) that mean scale * (code - 1).

    Each plane quantizes what the planes before it left over.

    Args:
        w: float32 (N, K), finite.
        granularity: `tensor`, `channel` or `block:B`.
        rounding: `absmean`, `twn` or `mse`, see `fit_group`.
        levels: 3 or 4.
        planes: P.
        scale_type: the scales are rounded to this type before the codes are chosen.

    Returns:
        codes uint8 (P, N, K) and scale of `scale_type` (P, N or 1, G or 1).
    """
    codes, scales = [], []
    for _ in range(planes):
        plane, left, scale = [], [], []
        for row in split(w, granularity):
            steps = [fit_group(group, rounding, levels, scale_type) for group in row]
            ts = [assign(group, *step) for group, step in zip(row, steps, strict=True)]
            left += [[group - step[3] * t for group, t, step in zip(row, ts, steps, strict=True)]]
            plane += [[t + 1 for t in ts]]
            scale += [[step[3] for step in steps]]
        codes.append(_join(plane, w.shape).astype(np.uint8))
        w = _join(left, w.shape)
        scales.append(np.array(scale, scale_type))
    return np.stack(codes), np.stack(scales)


def assign(w: np.ndarray, factor: np.float32, low: np.float32, high: np.float32, _: np.float32) -> np.ndarray:
    """Return t = -1, 0, 1 or 2 for each weight of a group: where w * factor lies between -low, low, high."""
    scaled = w * factor
    above = (scaled > low).astype(np.float32) + (scaled > high).astype(np.float32)
    return above - (scaled < -low).astype(np.float32)


def fit_group(
    w: np.ndarray, rounding: str, levels: int, scale_type: type[np.floating]
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return factor, low, high (see `assign`) and scale of one group of weights, given as float32 (count,).

    - absmean: scale max(mean|w|, 1e-5), codes clamp(rint(w / scale)) [BitNet b1.58];
    - twn: zero where |w| <= 0.7 mean|w|, scale the mean of |w| of the others [Ternary Weight Networks];
    - mse: the least-squares optimum over all codes and scales.

    The fourth level, 2 * scale, serves the sign that needs it: a negative scale makes it the lowest level.
    mse takes the better sign; absmean and twn, which know no fourth level, take the sign of the largest
    magnitude. absmean then rounds and clamps to -1..2; twn draws the upper threshold at 3 times the lower
    one, as in a uniform grid, and fits the scale by least squares, of which the mean is the ternary case.
    In all of them a group of zeros has scale 0.
    """
    inf = np.float32(np.inf)
    magnitude = np.abs(w)
    if not magnitude.any():
        return np.float32(0), np.float32(0), inf, np.float32(0)
    if rounding == "mse":
        scale = _store(least_squares(w, levels), scale_type)
        size = np.abs(scale)
        return np.sign(scale), size * np.float32(0.5), size * np.float32(1.5) if levels == 4 else inf, scale
    mean = np.float32(math.fsum(magnitude) / w.size)
    sign = np.float32(-1 if levels == 4 and -w.min() > w.max() else 1)
    if rounding == "absmean":
        scale = _store(sign * max(mean, np.float32(1e-5)), scale_type)
        return np.float32(1) / scale, np.float32(0.5), np.float32(1.5) if levels == 4 else inf, scale
    low = np.float32(0.7) * mean
    high = np.float32(3) * low if levels == 4 else inf
    t = assign(w, sign, low, high, inf)
    mean_of_levels = math.fsum(sign * w * t) / max(1.0, math.fsum(t * t))
    scale = _store(sign * np.float32(mean_of_levels), scale_type)
    return sign, low, high, scale


def least_squares(w: np.ndarray, levels: int) -> np.float32:
    """Return the scale s that minimizes the sum of (w - s * t)^2 with each t the best of -1, 0, 1 (and 2).

    For given t the best s is A / B with A = sum(t w) and B = sum(t^2), and removes A^2 / B from the error.
    The best t for a given s > 0 change only where s = 2|w| (0 to +-1) and s = 2w/3 (1 to 2). So going down
    from s = inf, event by event, passes the optimum. With four levels -w is tried too: it gives negative s.
    """
    best_gain, best = -1.0, 0.0
    for sign in (1.0, -1.0)[: levels - 2]:
        v = sign * w.astype(np.float64)
        positive = v[v > 0] if levels == 4 else v[:0]
        event = np.concatenate([3 * np.abs(v), positive])
        order = np.argsort(-event, kind="stable")
        a = np.cumsum(np.concatenate([np.abs(v), positive])[order])
        b = np.cumsum(np.repeat([1.0, 3.0], [v.size, positive.size])[order])
        i = np.argmax(a * a / b)
        if a[i] * a[i] / b[i] > best_gain:
            best_gain, best = a[i] * a[i] / b[i], sign * a[i] / b[i]
    return np.float32(best)


def quantize_integer(
    w: np.ndarray, granularity: str, bits: int, scale_type: type[np.floating] = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize symmetrically to 4- or 8-bit integers q, w ~ s * q, as bits / 2 planes of two-bit codes.

    The planes are the base-4 digits of q + 2^(bits - 1), highest first, with scales s * 4^i and zero points
    2, 0, 0, 0. s is the least by which no weight is off by more than a half: max|w| / 127 with 8 bits. 4 bits
    use all levels from -8 to 7: s is the larger of max|w| / 8 and m / 7.5, m the largest magnitude of the
    other sign, and negative if max|w| is that of a positive weight, which then is at -8. Its magnitude is
    rounded up to 16 significant bits (float16: 11, bfloat16: 8) so that s * q is exact in float32.

    Returns:
        codes uint8 (P, N, K), scale (P, N or 1, G or 1) and zero_point (P, 1, 1) of `scale_type`.
    """
    top = np.float32(2 ** (bits - 1) - 1)
    groups = split(w, granularity)
    steps = np.array([[_integer_step(group, bits) for group in row] for row in groups], np.float32)
    mantissa, exponent = np.frexp(np.abs(steps).astype(np.float64))
    kept = {"float32": 16, "float16": 11, "bfloat16": 8}[np.dtype(scale_type).name]
    s = np.ldexp(np.ceil(np.ldexp(mantissa, kept)), exponent - kept).astype(np.float32)
    s = np.where(steps < 0, -s, s)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(1) / s
    factor[~np.isfinite(factor)] = 0  # zeros, or weights too small for float32 arithmetic
    q = [
        [np.clip(np.rint(group * f), -top - 1, top) for group, f in zip(row, factors, strict=True)]
        for row, factors in zip(groups, factor, strict=True)
    ]
    digits = _join(q, w.shape).astype(np.int32) + 2 ** (bits - 1)
    powers = range(bits - 2, -1, -2)
    zero_point = np.zeros((bits // 2, 1, 1), scale_type)
    zero_point[0] = 2
    return (
        np.stack([digits >> power & 3 for power in powers]).astype(np.uint8),
        np.stack([(s * 2**power).astype(scale_type) for power in powers]),
        zero_point,
    )


def _integer_step(w: np.ndarray, bits: int) -> np.float32:
    """Return the step of one group before it is rounded, see `quantize_integer`."""
    below, above = np.float32(max(-w.min(), 0)), np.float32(max(w.max(), 0))
    if bits == 8:
        return max(below, above) / np.float32(127)
    step = max(max(below, above) / np.float32(8), min(below, above) / np.float32(7.5))
    return -step if above > below else step


def fit_levels(
    w: np.ndarray, importance: np.ndarray, coefficient: np.ndarray, starts: np.ndarray, rounds: int
) -> np.ndarray:
    """Return the parameters theta of a grid of levels coefficient @ theta for one group of weights.

    From each start: every weight takes its nearest level, theta solves the weighted least squares for these
    levels, and so on; of all theta on the way that of the least weighted error is kept.

    Args:
        w: float (count,).
        importance: (count,), weighs the square of what each weight is off.
        coefficient: (levels, params).
        starts: (starts, params).
        rounds: how often theta is solved for.
    """
    best, least = starts[0], math.inf
    for theta in starts.astype(np.float64):
        for _ in range(rounds + 1):
            level = np.abs(w[:, None] - coefficient @ theta).argmin(axis=1)
            error = float(importance @ (w - coefficient[level] @ theta) ** 2)
            if error < least:
                best, least = theta, error
            root = np.sqrt(importance)
            theta = np.linalg.lstsq(coefficient[level] * root[:, None], w * root)[0]
    return np.asarray(best)


def compensated(
    w: np.ndarray, h: np.ndarray, values: np.ndarray, group: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Round weights to levels, one input after the other; the inputs not rounded yet make good the error.

    This is GPTQ as published: the best change of the others is e * H^-1[j, :] / H^-1[j, j], with H^-1 that of
    the inputs that are left.

    Args:
        w: (N, K).
        h: (K, K) second moments of the inputs, damped.
        values: (N, G, levels), what the weights of a group can be.
        group: (K,).
        order: (K,) in which order the inputs are rounded.

    Returns:
        levels (N, K).
    """
    w = w.astype(np.float64)
    level = np.empty(w.shape, np.int64)
    left = list(order)
    for j in order:
        inverse = np.linalg.inv(h[np.ix_(left, left)].astype(np.float64))
        here = values[:, group[j]]
        level[:, j] = np.abs(w[:, j, None] - here).argmin(axis=1)
        error = w[:, j] - np.take_along_axis(here, level[:, j, None], axis=1)[:, 0]
        w[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        left.remove(j)
    return level


def split(w: np.ndarray, granularity: str) -> list[list[np.ndarray]]:
    """Return the groups that share a scale: [rows or 1][groups of a row] vectors."""
    if granularity == "tensor":
        return [[w.reshape(-1)]]
    size = _block_size(granularity) or w.shape[1]
    return [[row[start : start + size] for start in range(0, row.size, size)] for row in w]


def _join(groups: list[list[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([group for row in groups for group in row]).reshape(shape)


def _block_size(granularity: str) -> int:
    return int(granularity.removeprefix("block:")) if granularity.startswith("block:") else 0


def _store(scale: np.float32, scale_type: type[np.floating]) -> np.float32:
    return np.float32(scale_type(scale))
