"""A matrix of few bits: what quantization makes, and what files hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.errors import ModelError
from onnx_bitnet.formats import FORMATS, Format

_CODES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Quantized:
    """A few-bit matrix W of N outputs and K inputs: W = sum over planes of scale * (code - zero_point).

    Args:
        format: name of the canonical byte layout of `weight`, see formats.py.
        n: outputs (rows).
        k: inputs (columns).
        block_size: inputs that share a scale; 0 means all of K.
        weight: uint8 (P, N, row_bytes), canonical packed codes.
        scale: float32 or float16 (P, N or 1, G or 1) with G = ceil(K / block_size).
        zero_point: type of `scale`, shape (P, 1, 1): one for each plane; 1 for ternary; with offsets
            (P, N, G).
        lossless: `dequantize()` equals the weight it was made from, value for value, in the weight's type.
        sqnr_db: signal to noise of the weights in dB; None when lossless.
        zeros: share of the weights that decode to 0.
    """

    format: str
    n: int
    k: int
    block_size: int
    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    lossless: bool
    sqnr_db: float | None = None
    zeros: float = 0.0

    @property
    def planes(self) -> int:
        """Planes of codes."""
        return int(self.weight.shape[0])

    @property
    def granularity(self) -> str:
        """What shares a scale: `tensor`, `channel` or `block:B`."""
        if self.block_size:
            return f"block:{self.block_size}"
        return "tensor" if self.scale.shape[1] == 1 else "channel"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and, where the format has them, zero points."""
        zero_point = self.zero_point.nbytes if FORMATS[self.format].four_levels else 0
        return self.weight.nbytes + self.scale.nbytes + zero_point

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, scales and zero points included."""
        return 8 * self.nbytes / (self.n * self.k)

    def codes(self) -> np.ndarray:
        """Return the codes 0..3 as uint8 (P, N, K)."""
        return FORMATS[self.format].unpack(self.weight, self.k)

    def to(self, form: str) -> Quantized:
        """Return the same matrix in another format; nothing but its bytes changes.

        >>> quantize(np.float32([[0.5, 0, -0.5, 0.5, 0.5]])).to("t5").weight.tolist()
        [[[221]]]

        Raises:
            ModelError: it has four levels or a zero point other than 1, which only i2s holds.
        """
        target = FORMATS[form]
        if not target.four_levels and not (self.zero_point == 1).all():
            raise ModelError(
                f"weight: its zero points are not 1, so it cannot be {form}; only i2s can hold it"
            )
        try:
            weight = _recode(self.weight, self.k, FORMATS[self.format], target)
        except ValueError as error:
            raise ModelError(f"{error}; it cannot be {form}") from None
        return dataclasses.replace(self, format=form, weight=weight)

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        first, last, step = rows.indices(self.n)
        if step != 1:
            raise ValueError(f"rows {rows} must follow one another")
        out = np.empty((max(0, last - first), self.k), np.float32)
        if out.size:
            scale, zero_point = spread(self.scale, self.zero_point, self.k, self.block_size)
            if scale.shape[1] > 1:
                scale, zero_point = scale[:, first:last], zero_point[:, first:last]
            weight = _recode(self.weight[:, first:last], self.k, FORMATS[self.format], FORMATS["i2s"])
            weight, scale, zero_point = map(np.ascontiguousarray, (weight, scale, zero_point))
            _native.dequantize(weight, scale, zero_point, self.k, self.block_size, out, 0, last - first)
        return out


def _recode(weight: np.ndarray, k: int, source: Format, target: Format) -> np.ndarray:
    """Turn packed planes (P, N, bytes) into those of another format, some rows at a time."""
    if source == target:
        return weight
    recoded = np.empty((*weight.shape[:2], target.row_bytes(k)), np.uint8)
    step = max(1, _CODES_AT_ONCE // k)
    for start in range(0, weight.shape[1], step):
        rows = slice(start, start + step)
        recoded[:, rows] = target.pack(source.unpack(weight[:, rows], k))
    return recoded


def spread(
    scale: np.ndarray, zero_point: np.ndarray, k: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bring scales and zero points to float32 (P, N or 1, G), as the decoder wants them."""
    shape = (*scale.shape[:2], -(-k // (block_size or k)))
    spread = (np.broadcast_to(values, shape) for values in (scale, zero_point))
    return tuple(np.ascontiguousarray(values, np.float32) for values in spread)  # type: ignore[return-value]
