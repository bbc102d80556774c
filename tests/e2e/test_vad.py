"""Silero VAD: every layer is inside the two branches of an If."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import vad

import onnx_bitnet as bn
from onnx_bitnet.report import Report

LAYERS = {"silero_vad.onnx": {"Conv": 2}, "silero_vad_op18_ifless.onnx": {"Conv": 2, "Gemm": 4}}


@pytest.fixture(scope="module", params=vad.VARIANTS)
def converted(request, vad_model, tmp_path_factory) -> tuple[Path, Report, Path]:
    source = vad_model(request.param)
    path = tmp_path_factory.mktemp("vad") / "vad.bitnet.onnx"
    return source, bn.convert(source, path, bn.Recipe(mode="ternary", activation_bits=32)), path


def test_layers_are_found_in_both_branches(converted):
    source, report, _ = converted
    counts = {}
    for layer in report.converted:
        counts[layer.op_type] = counts.get(layer.op_type, 0) + 1
    assert counts == LAYERS[source.name]
    for branch in ("then_branch", "else_branch"):
        inside = [layer for layer in report.converted if layer.where.endswith(branch)]
        assert len(inside) == len(report.converted) // 2
    assert all(layer.where for layer in report.kept)


@pytest.mark.parametrize("rate", vad.SAMPLES)
def test_both_branches_equal_the_float_model_with_those_weights(
    converted, rate, run_stock, simulate, tmp_path
):
    source, _, path = converted
    feeds = vad.frame(rate, batch=2)
    expected = run_stock(simulate(source, path, tmp_path / "simulated.onnx"), feeds)
    packed = bn.session(path).run(None, feeds)
    stock = run_stock(path, feeds)
    for e, p, s in zip(expected, packed, stock, strict=True):
        np.testing.assert_allclose(p, e, atol=1e-5)
        np.testing.assert_allclose(s, e, atol=1e-5)


def test_auto_mode_leaves_a_working_model(converted, run_stock, tmp_path):
    source, _, _ = converted
    report = bn.convert(source, tmp_path / "auto.onnx")
    assert report.converted == ()
    feeds = vad.frame()
    for kept, original in zip(
        run_stock(tmp_path / "auto.onnx", feeds), run_stock(source, feeds), strict=True
    ):
        np.testing.assert_array_equal(kept, original)
