"""A language model of Llama's kind, with ops of opset 23: its first layers, converted and validated."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import smollm2

import onnx_bitnet as bn

HEAD = ("output", "keep")


@pytest.fixture(scope="module")
def rows() -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Two batches to calibrate with and one to measure with, of 32 tokens a row."""
    known, new = smollm2.rows(12, 4)
    return [{"input_ids": part[:, :32]} for part in np.split(known, 2)], [{"input_ids": new[:, :32]}]


def test_every_layer_is_found(smollm2_beginning):
    report = bn.plan(smollm2_beginning, {"mode": "ternary", "rules": [HEAD]})
    assert len(report.converted) == 14
    assert [layer.name for layer in report.layers if layer.reason is not None] == ["output"]


def test_bits_cost_what_they_should_and_data_helps(smollm2_beginning, rows, tmp_path):
    known, new = rows

    def sqnr(recipe, data=None) -> float:
        bn.convert(smollm2_beginning, tmp_path / "out.onnx", recipe, data=data, force=True)
        result = bn.validate(smollm2_beginning, tmp_path / "out.onnx", new, layers=False)
        return result.outputs[0].metrics.sqnr_db

    int8 = sqnr({"rules": [HEAD, {"action": "int8"}]})
    int4 = {"rules": [HEAD, {"action": "int4", "granularity": "block:64"}]}
    rounded, calibrated = sqnr(int4), sqnr(int4, known)
    assert int8 > 30 > calibrated > rounded + 3


def test_onnxruntimes_own_bits_are_counted(smollm2_beginning, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    perplexity = importlib.import_module("perplexity")
    config = perplexity.PEERS["ORT 4-bit block 32, symmetric"]()
    bits = perplexity.peer(config, smollm2_beginning, tmp_path / "peer.onnx")
    assert bits == pytest.approx(4 + 32 / 32, rel=1e-3)
    for recipe in perplexity.OURS.values():
        bn.Recipe.parse(recipe)
