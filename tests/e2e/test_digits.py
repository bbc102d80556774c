"""A natively ternary model: small, lossless, and the same predictions with and without the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import digits
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import onnx_bitnet as bn
from onnx_bitnet.report import Reason, Report


@pytest.fixture(scope="module")
def converted(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    path = tmp_path_factory.mktemp("digits") / "digits.bitnet.onnx"
    return bn.convert(digits_model, path), path


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"pixels": digits.splits()[1].images}


def test_ternary_layers_convert_losslessly(converted):
    report, _ = converted
    assert report.lossless
    assert [layer.name for layer in report.converted] == ["hidden.0", "hidden.1"]
    assert [(layer.name, layer.reason) for layer in report.kept] == [("head", Reason.NOT_TERNARY)]
    assert all(layer.sqnr_db is None and layer.zeros > 0.2 for layer in report.converted)


def test_predictions_are_identical(converted, digits_model, feeds, run_stock):
    _, path = converted
    labels = digits.splits()[1].labels
    (expected,) = run_stock(digits_model, feeds)
    (logits,) = bn.session(path).run(None, feeds)
    np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))
    assert digits.accuracy(logits, labels) == digits.accuracy(expected, labels) >= 0.95


def test_converted_weights_are_twelve_times_smaller(converted, digits_model):
    report, path = converted
    in_file = sum(
        len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer if "hidden" in tensor.name
    )
    biases = 4 * (256 + 256)
    assert 12 * sum(layer.packed_bytes for layer in report.converted) <= 4 * (64 * 256 + 256 * 256)
    assert 12 * (in_file - biases) <= 4 * (64 * 256 + 256 * 256)
    assert path.stat().st_size < digits_model.stat().st_size / 4


def test_file_runs_without_the_library(converted, feeds, run_stock):
    _, path = converted
    onnx.checker.check_model(path, full_check=True)
    (packed,) = bn.session(path).run(None, feeds)
    (stock,) = run_stock(path, feeds)
    (reference,) = ReferenceEvaluator(str(path)).run(None, feeds)
    for logits in (stock, reference):
        np.testing.assert_array_equal(logits.argmax(axis=1), packed.argmax(axis=1))
        np.testing.assert_allclose(logits, packed, atol=2e-4)


@pytest.mark.parametrize("form", ["tl1", "tl2", "t5"])
def test_every_format_is_lossless_and_predicts_the_same(
    converted, digits_model, feeds, run_stock, tmp_path, form
):
    report = bn.convert(digits_model, tmp_path / "model.onnx", bn.Recipe(format=form))
    assert report.lossless
    assert {layer.format for layer in report.converted} == {form}
    smaller = sum(layer.packed_bytes for layer in report.converted)
    assert smaller <= sum(layer.packed_bytes for layer in converted[0].converted)
    (expected,) = bn.session(converted[1]).run(None, feeds)
    (logits,) = bn.session(tmp_path / "model.onnx").run(None, feeds)
    np.testing.assert_array_equal(logits, expected)
    for stock in (run_stock, lambda path, feeds: ReferenceEvaluator(str(path)).run(None, feeds)):
        np.testing.assert_allclose(stock(tmp_path / "model.onnx", feeds)[0], expected, atol=2e-4)


def test_eight_bit_activations_are_what_it_was_trained_for(digits_model, feeds, tmp_path):
    report = bn.convert(digits_model, tmp_path / "a8.onnx", bn.Recipe(mode="lossless", activation_bits=8))
    (logits,) = bn.session(tmp_path / "a8.onnx").run(None, feeds)
    assert {layer.activation_bits for layer in report.converted} == {8}
    assert digits.accuracy(logits, digits.splits()[1].labels) >= 0.95


@pytest.mark.parametrize("isa", sorted({kernel.isa for kernel in bn.kernels() if kernel.runs_here}))
def test_logits_are_the_same_bits_on_every_isa(converted, feeds, tmp_path, isa):
    _, path = converted
    np.save(tmp_path / "pixels.npy", feeds["pixels"])
    script = (
        "import sys, numpy as np, onnx_bitnet as bn; model, folder = sys.argv[1:]; "
        "pixels = np.load(folder + '/pixels.npy'); "
        "(logits,) = bn.session(model, threads=2).run(None, {'pixels': pixels}); "
        "np.save(folder + '/logits.npy', logits)"
    )
    environment = os.environ | {"ONNX_BITNET_ISA": isa}
    subprocess.run([sys.executable, "-c", script, path, tmp_path], check=True, env=environment)
    (expected,) = bn.session(path, threads=1).run(None, feeds)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


def test_conversion_is_reproducible(converted, digits_model, tmp_path):
    _, path = converted
    bn.convert(digits_model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_validation_finds_the_models_equal(converted, digits_model, feeds, tmp_path):
    np.savez(tmp_path / "test.npz", **feeds)
    result = bn.validate(digits_model, converted[1], tmp_path / "test.npz")
    assert result.passes(min_sqnr=60, min_cosine=0.99999)
    assert result.outputs[0].metrics.top1 == 1
    assert {layer.name for layer in result.layers} == {"hidden.0", "hidden.1"}
    assert all(layer.local.sqnr_db > 60 for layer in result.layers)
