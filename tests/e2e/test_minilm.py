"""A real transformer: what ternary costs it, what `auto` leaves alone, and its natively ternary twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.report import Reason, Report


@pytest.fixture(scope="module")
def ternary(minilm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    path = tmp_path_factory.mktemp("minilm") / "ternary.onnx"
    return bn.convert(minilm_model, path, bn.Recipe(mode="ternary")), path


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_ternary_mode_equals_the_float_model_with_those_weights(
    ternary, minilm_model, minilm_feeds, run_stock, simulate, tmp_path, record_property
):
    report, path = ternary
    assert len(report.converted) == 36
    assert not report.lossless
    assert all(0 < layer.sqnr_db < 15 for layer in report.converted)
    _, original = run_stock(minilm_model, minilm_feeds)
    _, simulated = run_stock(simulate(minilm_model, path, tmp_path / "simulated.onnx"), minilm_feeds)
    _, embedding = bn.session(path).run(None, minilm_feeds)
    assert cosine(embedding, simulated).min() > 0.9999
    # Nothing is asserted of this one: rounding a model that was not trained ternary ruins it, and we say so.
    record_property("cosine_to_fp32", float(cosine(embedding, original).mean()))


def test_ternary_file_runs_without_the_library(ternary, minilm_feeds, run_stock):
    _, path = ternary
    _, stock = run_stock(path, minilm_feeds)
    _, embedding = bn.session(path).run(None, minilm_feeds)
    np.testing.assert_allclose(stock, embedding, atol=1e-4)


def test_float_activations_are_exact(minilm_model, minilm_feeds, run_stock, simulate, tmp_path):
    path = tmp_path / "a32.onnx"
    bn.convert(minilm_model, path, bn.Recipe(mode="ternary", granularity="block:128", activation_bits=32))
    hidden, _ = bn.session(path).run(None, minilm_feeds)
    expected, _ = run_stock(simulate(minilm_model, path, tmp_path / "simulated.onnx"), minilm_feeds)
    np.testing.assert_allclose(hidden, expected, atol=2e-4)


def test_auto_mode_keeps_every_layer_and_says_so(minilm_model, minilm_feeds, run_stock, tmp_path):
    path = tmp_path / "auto.onnx"
    report = bn.convert(minilm_model, path)
    assert report.converted == ()
    assert report.reasons() == {Reason.NOT_TERNARY: 36, Reason.WEIGHT_NOT_CONSTANT: 12}
    assert any("not ternary" in note for note in report.notes)
    for kept, original in zip(
        run_stock(path, minilm_feeds), run_stock(minilm_model, minilm_feeds), strict=True
    ):
        np.testing.assert_array_equal(kept, original)


@pytest.mark.parametrize(("form", "bits"), [("i2s", 2.1), ("tl1", 2.1), ("tl2", 1.78), ("t5", 1.72)])
def test_native_ternary_weights_convert_losslessly(
    minilm_ternary_model, minilm_feeds, run_stock, tmp_path, form, bits
):
    path = tmp_path / "native.onnx"
    report = bn.convert(minilm_ternary_model, path, {"format": form})
    assert report.lossless
    assert len(report.converted) == 36
    assert {layer.granularity for layer in report.converted} == {"channel"}
    assert {layer.format for layer in report.converted} == {form}
    assert 8 * sum(layer.packed_bytes for layer in report.converted) <= bits * 10_616_832
    assert report.source_bytes - report.output_bytes > 39_000_000
    _, expected = run_stock(minilm_ternary_model, minilm_feeds)
    _, embedding = bn.session(path).run(None, minilm_feeds)
    assert cosine(embedding, expected).min() > 0.9999


def test_validation_says_what_ternary_costs(ternary, minilm_model, minilm_feeds):
    result = bn.validate(minilm_model, ternary[1], minilm_feeds)
    assert not result.passes(min_cosine=0.9)
    assert result.passes(min_cosine=0)
    assert [output.name for output in result.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert len(result.layers) == 36
    assert all(layer.local is not None and layer.accumulated is not None for layer in result.layers)
