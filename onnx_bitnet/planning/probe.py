"""The error that a layer is weighed by: that of four bits, made as a conversion would make it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.conversion.moments import moments_of
from onnx_bitnet.quantization.compensate import Problem
from onnx_bitnet.quantization.quantize import fitted_to
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.rotation import ROTATION, Rotation, rotation
from onnx_bitnet.quantization.spec import LayerSpec

_SPEC = LayerSpec(
    integer_bits=4, granularity="channel", levels=4, rounding="gptq", scale_type="float16", rotation=ROTATION
)


def noise_to_signal(off: np.ndarray, weight: np.ndarray, statistics: LayerStatistics) -> float:
    """Return tr(E C E^T) / tr(W M W^T) of some rows: what their outputs are off when the bias is corrected.

    C, the covariance, is there for the noise, since the bias takes away its mean; M is the second moment.
    """
    moment = np.asarray(statistics.second_moment)
    signal = float(np.vdot(weight @ moment, weight))
    means = off @ statistics.channel_mean
    noise = float(np.vdot(off @ moment, off)) - statistics.rows * float(means @ means)
    return max(noise, 0.0) / signal if signal > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Probe:
    """A weight in four bits; small enough to be kept for all layers of a model.

    Args:
        quantized: in its basis.
        basis: None if that is the weight's own.
        mean: float32 (K,) of the inputs.
    """

    quantized: Quantized
    basis: Rotation | None
    mean: np.ndarray

    @classmethod
    def of(cls, name: str, weight: np.ndarray, statistics: LayerStatistics) -> Probe:
        """Round the weight (N, K) of a layer by the second moments of its inputs."""
        basis, moments = rotation(weight.shape[1], ROTATION), moments_of(name, statistics)
        rows = np.ascontiguousarray(weight, np.float32)
        if basis is not None:
            rows, moments = basis.rows(rows), moments.rotated(basis)
        problem = Problem.of(rows, moments)
        quantized = fitted_to(problem, rows, _SPEC, "channel", turns=0)
        return cls(quantized, basis, statistics.channel_mean)

    def decoded(self, weight: np.ndarray) -> np.ndarray:
        """Return float32 (N, K) with which the mean of each output is that of the weight.

        What a bias would correct is taken out of the weights instead, along the mean of the inputs.
        """
        rows = self.quantized.dequantize()
        rows = self.basis.back(rows) if self.basis is not None else rows
        square = float(self.mean @ self.mean)
        if square > 0:
            rows -= np.outer((rows - weight) @ self.mean, self.mean / square)
        return rows
