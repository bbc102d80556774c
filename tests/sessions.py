"""Models in onnxruntime with the library registered, and what their results must be."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort

from onnx_bitnet import runtime


def options(threads: int = 1) -> ort.SessionOptions:
    """Session options with the ops registered, which print nothing."""
    made = runtime.quiet_options()
    made.intra_op_num_threads = threads
    runtime.register(made)
    return made


def open_model(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    return ort.InferenceSession(
        model.SerializeToString(), options(threads), providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, x: np.ndarray, threads: int = 1) -> np.ndarray:
    return open_model(model, threads).run(None, {"x": x})[0]


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)  # NaN equals NaN here
