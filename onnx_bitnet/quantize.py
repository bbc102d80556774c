"""Turn a weight matrix into packed codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        zero_point: shape and type of `scale`; 1 for ternary.
        lossless: `dequantize()` equals the weight it was made from, value for value.
        sqnr_db: signal to noise of the weights in dB; None when lossless.
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
