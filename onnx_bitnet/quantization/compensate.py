"""Rounding with error compensation: codes and scales of a whole layer, fitted to what its inputs do.

The error of a layer over its calibration rows X is tr(E H E^T) with H = X^T X and E what the weights are off.
It is brought down for each output on its own:

1. scales of each group from an alternating fit, weighted by the diagonal of H;
2. codes one input after the other, the largest diagonal first, each taking up the errors of those before
   [GPTQ, Frantar 2022; as LDLQ, Chee 2023: with H = U D U^T the feedback is U, nothing is inverted];
3. in turns, the scales by block least squares and each code by coordinate descent, both under all of H:
   neither ever adds to the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from onnx_bitnet import _native
from onnx_bitnet.machine import cpus
from onnx_bitnet.quantization.grids import Grid
from onnx_bitnet.quantization.rotation import Rotation

# What is added to the diagonal of H, as a share of its mean: inputs over rows seen, and at least this. Few
# rows tell little of how inputs go together; errors would be sent where these alone happen to be small.
_DAMPING = 0.01
_COLUMNS = 128
_ROWS = 256
_FIT_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows x that a layer reads in the converted model and rows f that it reads in the float model.

    Args:
        rows: how many.
        second: float32 (K, K), sum of x x^T.
        cross: float32 (K, K), sum of x f^T; None where x and f are the same.
        mean: float64 (K,), of x.
        float_mean: float64 (K,), of f.
    """

    rows: int
    second: np.ndarray
    cross: np.ndarray | None
    mean: np.ndarray
    float_mean: np.ndarray

    def rotated(self, rotation: Rotation) -> Moments:
        """Return the moments of rotated rows."""
        cross = None if self.cross is None else rotation.both(self.cross)
        mean, float_mean = rotation.rows(np.stack([self.mean, self.float_mean]).astype(np.float32))
        return Moments(self.rows, rotation.both(self.second), cross, mean, float_mean)

    def bias_shift(self, weight: np.ndarray, packed: np.ndarray) -> np.ndarray:
        """Return what makes the mean output of packed weights that of the float ones: float32 (N,)."""
        float_output = np.asarray(weight, np.float32) @ self.float_mean.astype(np.float32)
        shift: np.ndarray = float_output - packed @ self.mean.astype(np.float32)
        return shift


@dataclass(frozen=True, eq=False)
class Problem:
    """What all rows of a layer have in common, and the values that they should come near.

    Args:
        target: float32 (N, K).
        h: float32 (K, K), the damped second moments of the inputs.
        order: (K,) the inputs, largest diagonal first.
        feedback: float32 (K, K) in that order: unit upper triangular U of H = U D U^T.
    """

    target: np.ndarray
    h: np.ndarray
    order: np.ndarray
    feedback: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, moments: Moments, *, diagonal: bool = False) -> Problem:
        """Prepare the problem of a weight float32 (N, K).

        Moments are taken about the means, which the bias makes good. Where the models differ the target is
        W' = W S^T H^-1 with S the cross moments: what is nearest to the float model's outputs.

        Args:
            weight: W.
            moments: of its inputs.
            diagonal: count the inputs as independent of one another.
        """
        h = moments.second - moments.rows * np.outer(moments.mean, moments.mean)
        k = h.shape[0]
        share = _DAMPING if diagonal else max(_DAMPING, k / max(moments.rows, 1))
        # what float32 sums are off; of inputs that hardly vary about their means, they leave little else
        rounding = 4 * float(np.finfo(np.float32).eps) * float(np.trace(moments.second, dtype=np.float64))
        damping = max(share * (float(np.trace(h)) / k), rounding) or 1.0
        target = weight
        if diagonal:
            h = np.diag(np.diag(h))
        elif moments.cross is not None:
            apart = moments.cross - moments.rows * np.outer(moments.mean, moments.float_mean) - h
            h[np.diag_indices_from(h)] += damping
            target = weight + np.linalg.solve(h, apart @ weight.T.astype(np.float64)).T
            h[np.diag_indices_from(h)] -= damping
        h[np.diag_indices_from(h)] += damping
        order = np.argsort(-np.diag(h), kind="stable")
        upper = np.linalg.cholesky(h[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]
        upper /= np.diag(upper).copy()
        feedback = np.ascontiguousarray(upper, np.float32)
        return cls(np.ascontiguousarray(target, np.float32), h.astype(np.float32), order, feedback)

    def errors(self, w: np.ndarray) -> np.ndarray:
        """Return the error of each row of decoded weights (N, K): what all this is about."""
        off = w - self.target
        total: np.ndarray = np.einsum("nk,nk->n", off @ self.h, off)
        return total


def fit(
    problem: Problem,
    grid: Grid,
    block_size: int,
    scale_type: type,
    *,
    turns: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Return levels uint8 (N, K) and stored parameters float32 (N, G, params)."""

    def some(first: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.ascontiguousarray(problem.target[first : first + _ROWS])
        return _Rows(rows, problem, grid, block_size, scale_type).run(turns)

    # Threads share out the rows; a BLAS that starts threads of its own in each of them only gets in the way.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpus()) as pool:
        parts = list(pool.map(some, range(0, problem.target.shape[0], _ROWS)))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


class _Rows:
    """Some rows on their way: levels `index`, parameters `theta`, decoded values `w`."""

    def __init__(
        self,
        target: np.ndarray,
        problem: Problem,
        grid: Grid,
        block_size: int,
        scale_type: type,
    ) -> None:
        self.target, self.problem, self.grid, self.scale_type = target, problem, grid, scale_type
        n, k = target.shape
        self.block = block_size or k
        self.groups = -(-k // self.block)
        self.group = (np.arange(k) // self.block).astype(np.int32)
        self.index = np.empty((n, k), np.uint8)
        self.w = np.empty_like(target)

    def run(self, turns: int) -> tuple[np.ndarray, np.ndarray]:
        self.theta = self._first_theta()
        self._feed_back()
        for _ in range(turns):
            gradient = (self.w - self.target) @ self.problem.h
            self._refit(gradient)
            self._descend(gradient)
        return self.index, self.theta

    def _first_theta(self) -> np.ndarray:
        theta = np.zeros((self.target.shape[0], self.groups, self.grid.template.shape[1]), np.float32)
        importance = np.ascontiguousarray(np.diag(self.problem.h))
        _native.fit_grid(
            self.grid.coefficient,
            self.target,
            importance,
            self.grid.template,
            theta,
            block_size=self.block,
            rounds=_FIT_ROUNDS,
        )
        return self.grid.store(theta, self.scale_type)

    def _feed_back(self) -> None:
        order, feedback = self.problem.order, self.problem.feedback
        target, group = self.target[:, order], self.group[order]
        tables = _native.Tables(self.grid.coefficient, self.theta)
        error, index = np.empty_like(target), np.empty_like(self.index)
        for columns in _blocks(target.shape[1]):
            base = np.ascontiguousarray(target[:, columns])
            state = base - error[:, : columns.start] @ feedback[: columns.start, columns]
            inside = np.ascontiguousarray(feedback[columns, columns])
            part, off = np.empty(base.shape, np.uint8), np.empty_like(base)
            tables.feedback(group[columns], inside, base, state, part, off)
            index[:, columns], error[:, columns] = part, off
        self.index[:, order] = index
        self.w[:, order] = target + error

    def _descend(self, gradient: np.ndarray) -> None:
        """Give each code, in order, the level that is best while all others stay."""
        h = self.problem.h
        tables = _native.Tables(self.grid.coefficient, self.theta)
        diagonal = np.diag(h)
        for columns in _blocks(h.shape[0]):
            base = np.ascontiguousarray(self.w[:, columns])
            state = base - gradient[:, columns] / diagonal[columns]
            inside = np.ascontiguousarray(h[columns, columns] / diagonal[columns])
            part, off = np.empty(base.shape, np.uint8), np.empty_like(base)
            tables.feedback(self.group[columns], inside, base, state, part, off)
            self.index[:, columns] = part
            self.w[:, columns] = base + off
            gradient += off @ h[columns]

    def _refit(self, gradient: np.ndarray) -> None:
        """Solve for the parameters of each group while the others stay; keep what helps once it is stored.

        The gradient, (w - target) H, is kept up to date.
        """
        h = self.problem.h
        for g in range(self.groups):
            columns = slice(g * self.block, min((g + 1) * self.block, h.shape[0]))
            t = np.moveaxis(self.grid.coefficient[self.index[:, columns]], -1, 1)  # (n, params, B)
            ht = t @ h[columns, columns]
            a = ht @ t.transpose(0, 2, 1)
            b = -(t @ gradient[:, columns, None])[..., 0]
            theta = self.theta[:, g]
            stored = self.grid.store(theta + _solved(a, b), self.scale_type)
            step = stored - theta
            gain = 2 * (b * step).sum(axis=1) - (step * (a @ step[..., None])[..., 0]).sum(axis=1)
            step[~(gain > 0)] = 0
            self.theta[:, g] = np.where((gain > 0)[:, None], stored, theta)
            off = (step[:, None, :] @ t)[:, 0]
            self.w[:, columns] += off
            gradient += off @ h[columns]


def _solved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve small symmetric systems (n, p, p); a code that no weight of the group has adds nothing."""
    size = a.shape[-1]
    tiny = 1e-6 * np.trace(a, axis1=1, axis2=2)[:, None, None] / size + 1e-30
    return np.linalg.solve(a + tiny * np.eye(size, dtype=a.dtype), b[..., None])[..., 0]


def _blocks(k: int) -> Iterator[slice]:
    for start in range(0, k, _COLUMNS):
        yield slice(start, min(k, start + _COLUMNS))
