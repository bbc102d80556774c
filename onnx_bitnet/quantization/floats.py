"""Weights as floats of 8 or 4 bits and scales: simulated, or stored for onnxruntime's DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnx_bitnet import scale_types
from onnx_bitnet.errors import ModelError
from onnx_bitnet.granularity import stored_block_size
from onnx_bitnet.quantization import scales
from onnx_bitnet.quantization.spec import LayerSpec

TYPES = {
    "fp8e4m3": ml_dtypes.float8_e4m3fn,
    "fp8e5m2": ml_dtypes.float8_e5m2,
    "fp4e2m1": ml_dtypes.float4_e2m1fn,
}
_LARGEST = {"fp8e4m3": 448.0, "fp8e5m2": 57344.0, "fp4e2m1": 6.0}


@dataclass(frozen=True, eq=False)
class Floats:
    """A matrix W = scale * v of N outputs and K inputs with small floats v.

    Args:
        format: name of their type, one of the recipe's actions.
        bits: uint8 (K, N), the pattern of each v, whatever its width.
        scale: float32 (N or 1, G), G = ceil(K / block_size).
        block_size: inputs that share a scale; 0 means all of K.
        lossless: `dequantize()` equals the weight it was made from, value for value.
        sqnr_db: signal to noise of the weights in dB; None when lossless.
        zeros: share of the weights that decode to 0.
    """

    format: str
    bits: np.ndarray
    scale: np.ndarray
    block_size: int
    lossless: bool
    sqnr_db: float | None
    zeros: float

    planes = 0

    @property
    def n(self) -> int:
        """Outputs."""
        return int(self.bits.shape[1])

    @property
    def k(self) -> int:
        """Inputs."""
        return int(self.bits.shape[0])

    @property
    def granularity(self) -> str:
        """What shares a scale: `tensor`, `channel` or `block:B`."""
        if self.block_size:
            return f"block:{self.block_size}"
        return "tensor" if self.scale.shape[0] == 1 else "channel"

    @property
    def nbytes(self) -> int:
        """Bytes of values, one each, and scales."""
        return self.bits.nbytes + self.scale.nbytes

    @property
    def values(self) -> np.ndarray:
        """The small floats v, (K, N)."""
        return self.bits.view(TYPES[self.format])

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the weight matrix, or some of its rows, as float32 (rows, K)."""
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[rows]
        spread = np.repeat(scale, self.block_size or self.k, axis=1)[:, : self.k]
        decoded: np.ndarray = self.values[:, rows].T.astype(np.float32) * spread
        return decoded


def quantize_floats(weight: np.ndarray, spec: LayerSpec) -> Floats:
    """Round a weight (N, K) to the nearest floats of `spec.float_type`.

    The largest magnitude of each group becomes the largest value of the type; scales are rounded up to the
    spec's scale type (float32 unless it names one), so that nothing is clipped.

    Raises:
        ModelError: the weight holds values near the largest float32, which overflow when decoded.
    """
    n, k = weight.shape
    granularity = spec.settled_granularity
    block_size = stored_block_size(granularity, k)
    scale = _scales(weight, spec, granularity)
    bits = np.empty((k, n), np.uint8)
    largest = np.float32(_LARGEST[spec.float_type])

    def work(first: int, last: int) -> tuple[float, float, bool, int]:
        exact = weight[first:last].astype(np.float32)
        some = scale if scale.shape[0] == 1 else scale[first:last]
        spread = np.repeat(np.where(some == 0, np.float32(1), some), block_size or k, axis=1)[:, :k]
        rounded = np.clip(exact / spread, -largest, largest).astype(TYPES[spec.float_type])
        bits[:, first:last] = rounded.view(np.uint8).T
        with np.errstate(over="ignore"):
            decoded = rounded.astype(np.float32) * spread
        off = (exact - decoded).astype(np.float64)
        different = not np.array_equal(decoded.astype(weight.dtype), weight[first:last])
        return (
            float(np.square(off).sum()),
            float(np.square(exact, dtype=np.float64).sum()),
            different,
            int((decoded == 0).sum()),
        )

    parts = scales.over_rows(weight, work)
    error, signal, different, zeros = (sum(values) for values in zip(*parts, strict=True))
    if not np.isfinite(error):
        raise ModelError(
            "weight: values near the largest float32 overflow when decoded; keep this layer with a rule"
        )
    sqnr_db = float(10 * np.log10(signal / error)) if different else None
    return Floats(spec.float_type, bits, scale, block_size, not different, sqnr_db, zeros / (n * k))


def _scales(weight: np.ndarray, spec: LayerSpec, granularity: str) -> np.ndarray:
    """Return float32 (N or 1, G)."""
    least = scales.largest(weight, granularity) / np.float32(_LARGEST[spec.float_type])
    wanted = scale_types.TYPES["float32" if spec.scale_type == "auto" else spec.scale_type]
    scale = scale_types.upwards(least, wanted)
    if (scale_types.is_held(scale, wanted) | (least == 0)).all():
        return scale
    return scale_types.upwards(least, np.float32)
