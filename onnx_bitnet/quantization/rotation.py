"""Block-Hadamard rotation: a basis in which weights have no outliers, so that few levels fit them better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native

# What is usual: large enough to spread an outlier, small enough for any width of a transformer.
ROTATION = 128
_SMALLEST = 16


@dataclass(frozen=True, eq=False)
class Rotation:
    """What the op BlockHadamard does: H (x * signs) / sqrt(block_size) in blocks of the last axis.

    Args:
        block_size: a power of two that K is a multiple of.
        signs: float32 (K,) of 1 and -1.
    """

    block_size: int
    signs: np.ndarray

    def rows(self, x: np.ndarray) -> np.ndarray:
        """Return rows float32 (rows, K) in the new basis."""
        y = np.empty(x.shape, np.float32)
        isa = _native.find("hadamard", "f32")
        assert isa is not None  # there is a scalar one
        _native.hadamard(
            np.ascontiguousarray(x, np.float32), self.signs, y, block_size=self.block_size, isa=isa
        )
        return y

    def back(self, y: np.ndarray) -> np.ndarray:
        """Return rows float32 (rows, K) in the basis that `rows` took them from: H is its own inverse."""
        ones = Rotation(self.block_size, np.ones_like(self.signs))
        turned: np.ndarray = ones.rows(y) * self.signs
        return turned

    def both(self, matrix: np.ndarray) -> np.ndarray:
        """Return a matrix float32 (K, K) of products of inputs in the new basis."""
        return np.ascontiguousarray(self.rows(np.ascontiguousarray(self.rows(matrix).T)).T)


def rotation(k: int, most: int) -> Rotation | None:
    """Return the rotation of K inputs in the largest blocks up to `most` that fit; None if there are none.

    The signs depend on K alone, so that layers which read the same value share one rotation of it.
    """
    block_size = min(k & -k, most)
    if block_size < _SMALLEST:
        return None
    signs = np.where(np.random.default_rng(k).integers(0, 2, k) == 1, 1, -1)
    return Rotation(block_size, signs.astype(np.float32))
