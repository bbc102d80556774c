"""How far one tensor is from another, summed up over batches in float64 with bounded memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Elements taken to float64 at a time: the handful of temporaries then stays in the second-level cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Metrics:
    """The distance between a reference tensor and another one, over all batches.

    Elements that are NaN or infinite alike in both tensors count as equal and are left out of the sums. An
    element that is finite in only one of them, or infinite in another way, is an infinite error: SQNR is
    minus infinity, the cosine 0.

    Integer, boolean and string tensors have `agreement` only; float tensors have everything else.

    Args:
        elements: number of elements compared.
        identical: equal value for value.
        agreement: share of equal elements.
        sqnr_db: 10 log10(sum r^2 / sum (g - r)^2); infinite when there is no error.
        cosine: of the flattened tensors; 1 for two zero tensors, 0 if one of them is zero.
        row_cosine: mean of the cosines along the last axis; None if that axis has one element.
        relative_l2: |g - r| / |r|.
        max_abs: largest absolute difference.
        top1: share of rows with the same argmax along the last axis; None if that axis has one element, or if
            the tensor was not compared as one of scores.
        kl: mean Kullback-Leibler divergence, in nats, of softmax(got) from softmax(reference), likewise.
        nonfinite_reference: NaN and infinite elements of the reference.
        nonfinite_got: the same of the other tensor.
        nonfinite_differ: elements that are not finite in one of them and not the same in the other.
    """

    elements: int
    identical: bool
    agreement: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    row_cosine: float | None = None
    relative_l2: float | None = None
    max_abs: float | None = None
    top1: float | None = None
    kl: float | None = None
    nonfinite_reference: int = 0
    nonfinite_got: int = 0
    nonfinite_differ: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; infinity, which JSON lacks, becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


class Accumulator:
    """Sums over batches from which `result` makes the metrics of one tensor.

    Args:
        scores: compare rows as scores of classes as well: `top1` and `kl`, which take most of the time.

    >>> distance = Accumulator()
    >>> distance.update(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))
    >>> round(distance.result().sqnr_db, 2)
    20.0
    """

    def __init__(self, *, scores: bool = True) -> None:
        self._scores = scores
        self._exact = False
        self._elements = 0
        self._equal = 0
        self._nonfinite = [0, 0, 0]  # reference, got, differ
        self._squares = [0.0, 0.0, 0.0, 0.0]  # r r, g g, r g, (g - r)^2
        self._max_abs = 0.0
        self._cosines = [0, 0.0]  # rows, sum
        self._top1 = [0, 0]  # rows, rows that agree
        self._kl = [0, 0.0]  # rows, sum

    def update(self, reference: np.ndarray, got: np.ndarray) -> None:
        """Add one batch.

        Raises:
            ValueError: the two have different shapes.
        """
        if reference.shape != got.shape:
            raise ValueError(f"shape {list(got.shape)} instead of {list(reference.shape)}")
        self._elements += reference.size
        if reference.dtype.kind in "biuOSU":
            self._exact = True
            self._equal += int(np.count_nonzero(reference == got))
        elif reference.size:
            columns = reference.shape[-1] if reference.ndim else 1
            left, right = reference.reshape(-1, columns), got.reshape(-1, columns)
            step = max(1, _CHUNK // columns)
            for start in range(0, len(left), step):
                rows = slice(start, start + step)
                self._add(left[rows].astype(np.float64), right[rows].astype(np.float64))

    def _add(self, r: np.ndarray, g: np.ndarray) -> None:
        same = (r == g) | (np.isnan(r) & np.isnan(g))
        bad_r, bad_g = ~np.isfinite(r), ~np.isfinite(g)
        differ = (bad_r | bad_g) & ~same
        self._equal += int(np.count_nonzero(same))
        for index, mask in enumerate((bad_r, bad_g, differ)):
            self._nonfinite[index] += int(np.count_nonzero(mask))
        scores = self._scores and r.shape[1] > 1
        if scores:
            self._add_top1(r, g)
        finite = ~(bad_r | bad_g).any(axis=1)
        r[bad_r | bad_g] = 0.0
        g[bad_r | bad_g] = 0.0
        error = g - r
        self._max_abs = max(self._max_abs, float(np.abs(error).max()))
        rr, gg, rg, ee = (np.einsum("nk,nk->n", a, b) for a, b in ((r, r), (g, g), (r, g), (error, error)))
        for index, sums in enumerate((rr, gg, rg, ee)):
            self._squares[index] += float(sums.sum())
        if r.shape[1] > 1:
            self._cosines[0] += len(r)
            self._cosines[1] += float(np.where(differ.any(axis=1), 0.0, _cosine(rr, gg, rg)).sum())
        if scores:
            self._kl[0] += int(np.count_nonzero(finite))
            self._kl[1] += _kl(r[finite], g[finite])

    def _add_top1(self, r: np.ndarray, g: np.ndarray) -> None:
        decided = ~np.isnan(r).any(axis=1)  # a NaN in the reference has no argmax to agree with
        agree = decided & ~np.isnan(g).any(axis=1) & (r.argmax(axis=1) == g.argmax(axis=1))
        self._top1[0] += int(np.count_nonzero(decided))
        self._top1[1] += int(np.count_nonzero(agree))

    def result(self) -> Metrics:
        """Return the metrics of everything added so far."""
        identical = self._equal == self._elements
        if self._exact:
            share = self._equal / self._elements if self._elements else 1.0
            return Metrics(self._elements, identical, agreement=share)
        rr, gg, rg, ee = self._squares
        broken = self._nonfinite[2] > 0
        return Metrics(
            elements=self._elements,
            identical=identical,
            sqnr_db=-math.inf if broken else _sqnr(rr, ee),
            cosine=0.0 if broken else 1.0 if identical else float(_cosine(*np.array([rr, gg, rg]))),
            row_cosine=_mean(self._cosines),
            relative_l2=math.inf if broken else _ratio(math.sqrt(ee), math.sqrt(rr)),
            max_abs=math.inf if broken else self._max_abs,
            top1=_mean(self._top1),
            kl=math.inf if broken and self._scores and self._cosines[0] else _mean(self._kl),
            nonfinite_reference=self._nonfinite[0],
            nonfinite_got=self._nonfinite[1],
            nonfinite_differ=self._nonfinite[2],
        )


def _sqnr(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _ratio(a: float, b: float) -> float:
    if a == 0.0:
        return 0.0
    return a / b if b > 0.0 else math.inf


def _mean(count_and_sum: list[float] | list[int]) -> float | None:
    count, total = count_and_sum
    return total / count if count else None


def _cosine(rr: np.ndarray, gg: np.ndarray, rg: np.ndarray) -> np.ndarray:
    """Return rg / sqrt(rr gg), elementwise, with 1 where both vectors are zero and 0 where one is."""
    norm = np.sqrt(rr) * np.sqrt(gg)
    ratio = np.divide(rg, norm, out=np.zeros_like(norm), where=norm > 0.0)
    return np.where((rr == 0.0) & (gg == 0.0), 1.0, np.clip(ratio, -1.0, 1.0))


def _kl(r: np.ndarray, g: np.ndarray) -> float:
    """Return the sum over rows of sum p (log p - log q), p = softmax(r), q = softmax(g)."""
    log_p, log_q = _log_softmax(r), _log_softmax(g)
    # Rounding can leave a divergence a hair below zero, which it never is.
    rows = np.einsum("nk,nk->n", np.exp(log_p), log_p - log_q)
    return float(np.maximum(rows, 0.0).sum())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = x - x.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
