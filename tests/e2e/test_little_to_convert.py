"""Models with hardly a linear layer, or none that is float, pass through unharmed; the report says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.report import Reason


@pytest.fixture(scope="module")
def file_bytes() -> dict[str, np.ndarray]:
    """Return two files as magika wants them: 2048 bytes each, 256 for padding."""
    return {"bytes": np.random.default_rng(0).integers(0, 257, (2, 2048)).astype(np.int32)}


def test_magika_is_kept_as_it_is(magika_model, file_bytes, run_stock, tmp_path):
    path = tmp_path / "magika.onnx"
    report = bn.convert(magika_model, path)
    assert report.converted == ()
    assert report.reasons()[Reason.NOT_TERNARY] == 2
    np.testing.assert_array_equal(run_stock(path, file_bytes)[0], run_stock(magika_model, file_bytes)[0])


def test_magika_converts_with_odd_k(magika_model, file_bytes, run_stock, simulate, tmp_path):
    path = tmp_path / "magika.onnx"
    report = bn.convert(magika_model, path, bn.Recipe(mode="ternary", activation_bits=32))
    assert sorted((layer.k, layer.n) for layer in report.converted) == [(257, 64), (512, 214)]
    (expected,) = run_stock(simulate(magika_model, path, tmp_path / "simulated.onnx"), file_bytes)
    np.testing.assert_allclose(bn.session(path).run(None, file_bytes)[0], expected, atol=1e-4)


def test_int8_model_is_refused_layer_by_layer(int8_model: Path, run_stock, tmp_path):
    path = tmp_path / "encoder.onnx"
    report = bn.convert(int8_model, path, bn.Recipe(mode="ternary"))
    assert report.converted == ()
    assert report.reasons()[Reason.ALREADY_QUANTIZED] == 56
    assert any("integer product already" in note for note in report.notes)
    feeds = {
        "input_ids": np.arange(1, 17, dtype=np.int64)[None],
        "attention_mask": np.ones((1, 16), np.int64),
    }
    np.testing.assert_array_equal(run_stock(path, feeds)[0], run_stock(int8_model, feeds)[0])
