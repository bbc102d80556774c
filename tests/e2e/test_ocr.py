"""PP-OCR recognition: every weight is a Constant node, opset 12, alphabet in the metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ocr
import pytest

import onnx_bitnet as bn
from onnx_bitnet.report import Reason, Report

MATMULS = {f"p2o.MatMul.{index}" for index in (0, 6, 8, 10, 12, 18, 20, 22, 24)}


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return ocr.lines(count=2)[0]


@pytest.fixture(scope="module")
def converted(ocr_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    path = tmp_path_factory.mktemp("ocr") / "ocr.bitnet.onnx"
    return bn.convert(ocr_model, path, bn.Recipe(mode="ternary", activation_bits=32)), path


def test_layers_are_found_through_constant_nodes(converted):
    report, _ = converted
    assert {layer.name for layer in report.converted if layer.op_type == "MatMul"} == MATMULS
    shapes = {layer.name: (layer.k, layer.n) for layer in report.converted}
    assert shapes["p2o.MatMul.24"] == (120, 6625)
    assert shapes["p2o.MatMul.0"] == (120, 360)


def test_what_is_no_linear_layer_is_kept_with_its_reason(converted):
    report, _ = converted
    assert {layer.op_type for layer in report.converted} == {"MatMul", "Conv"}
    # Attention multiplies activations with activations; most convolutions look at more than one pixel.
    assert set(report.reasons()) == {Reason.WEIGHT_NOT_CONSTANT, Reason.CONV_NOT_POINTWISE}
    assert report.reasons()[Reason.WEIGHT_NOT_CONSTANT] == 4


def test_outputs_equal_the_float_model_with_those_weights(
    converted, ocr_model, feeds, run_stock, simulate, tmp_path
):
    _, path = converted
    (expected,) = run_stock(simulate(ocr_model, path, tmp_path / "simulated.onnx"), feeds)
    (got,) = bn.session(path).run(None, feeds)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    (stock,) = run_stock(path, feeds)
    np.testing.assert_allclose(stock, expected, atol=1e-4)


def test_text_survives_when_the_matmuls_take_three_planes(ocr_model, tmp_path):
    path = tmp_path / "three.onnx"
    rules = [{"match": "*MatMul*", "overrides": {"planes": 3, "granularity": "channel"}}, ("*", "keep")]
    bn.convert(ocr_model, path, bn.Recipe(mode="ternary", rules=rules))
    session = bn.session(path)
    feeds, texts = ocr.lines()
    (probabilities,) = session.run(None, feeds)
    read = ocr.read(probabilities, session.get_modelmeta().custom_metadata_map)
    right = sum(
        a == b for line, text in zip(read, texts, strict=True) for a, b in zip(line, text, strict=False)
    )
    assert right >= 16  # of 32, the share that the float model reads
