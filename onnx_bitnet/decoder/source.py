"""Where the tensors of a decoder come from: a checkpoint, or a seeded random generator."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from onnx_bitnet.errors import ModelError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.weights import Weights

_ROWS = 4096


class Source(Protocol):
    """Tensors by the names that transformers gives them; large ones in parts of some rows."""

    def linear(self, module: str, n: int, k: int) -> Quantized:
        """Return the weight of a linear layer."""

    def norm(self, module: str, size: int) -> np.ndarray:
        """Return the gains of an RMSNorm, float32 (size,)."""

    def rows(self, module: str, n: int, k: int) -> Iterator[np.ndarray]:
        """Yield an embedding or a head (n, k) as floats, some rows at a time."""


class Checkpoint:
    """Tensors of a checkpoint that `load_weights` has opened.

    Args:
        weights: as opened.
        master: floats that are not ternary are master weights of BitLinear, and may be rounded.
    """

    def __init__(self, weights: Weights, *, master: bool) -> None:
        self._weights, self._master = weights, master

    def linear(self, module: str, n: int, k: int) -> Quantized:
        """Return the weight of a linear layer."""
        name = f"{module}.weight"
        if name not in self._weights:
            raise self._missing(name)
        quantized = self._weights[name]
        self._check(name, (quantized.n, quantized.k), (n, k))
        if not quantized.lossless and not self._master:
            raise ModelError(
                f"{self._weights.path}: {name!r} is not ternary, and config.json does not say that BitLinear "
                "rounds it; convert an export of this model instead, with mode 'ternary' and its losses"
            )
        return quantized

    def norm(self, module: str, size: int) -> np.ndarray:
        """Return the gains of an RMSNorm."""
        return self._other(f"{module}.weight", (size,)).astype(np.float32)

    def rows(self, module: str, n: int, k: int) -> Iterator[np.ndarray]:
        """Yield an embedding or a head, some rows at a time."""
        array = self._other(f"{module}.weight", (n, k))
        for first in range(0, n, _ROWS):
            yield array[first : first + _ROWS]

    def _other(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._weights.others:
            raise self._missing(name)
        array = self._weights.others[name]
        self._check(name, array.shape, shape)
        return array

    def _missing(self, name: str) -> ModelError:
        return ModelError(
            f"{self._weights.path}: half a checkpoint: {name!r} is missing; download the rest of it"
        )

    def _check(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise ModelError(
                f"{self._weights.path}: {name!r} has shape {list(shape)}, its config.json asks for "
                f"{list(expected)}; one of the two is from another model"
            )


class Random:
    """Random ternary weights and float embeddings; the same seed gives the same model.

    Scales keep the variance of activations, so that the numbers in the model are of the usual size.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        trits = np.indices((3,) * 4, np.uint8).reshape(4, -1)
        self._bytes = trits[0] | trits[1] << 2 | trits[2] << 4 | trits[3] << 6

    def linear(self, module: str, n: int, k: int) -> Quantized:
        """Return the weight of a linear layer."""
        row_bytes = FORMATS["i2s"].row_bytes(k)
        packed = self._bytes[self._rng(module).integers(0, 81, (1, n, row_bytes), np.uint8)]
        if k % 4:
            used = 4 ** (k % 4) - 1
            packed[..., -1] = packed[..., -1] & used | 0x55 & ~used
        scale = np.full((1, 1, 1), (1.5 / k) ** 0.5, np.float32)
        return Quantized("i2s", n, k, 0, packed, scale, np.ones((1, 1, 1), np.float32), lossless=True)

    def norm(self, module: str, size: int) -> np.ndarray:
        """Return the gains of an RMSNorm."""
        return self._rng(module).uniform(0.5, 1.5, size).astype(np.float32)

    def rows(self, module: str, n: int, k: int) -> Iterator[np.ndarray]:
        """Yield an embedding or a head, some rows at a time."""
        rng = self._rng(module)
        for first in range(0, n, _ROWS):
            values = rng.standard_normal((min(_ROWS, n - first), k), np.float32)
            yield (values * np.float32(k**-0.5)).astype(np.float16)

    def _rng(self, module: str) -> np.random.Generator:
        """Return a generator of its own for each module, so that the order of asking does not matter."""
        return np.random.default_rng([self._seed, zlib.crc32(module.encode())])
