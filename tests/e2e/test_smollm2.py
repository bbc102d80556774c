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
    """Four batches to calibrate with, and one to measure with."""
    known, new = smollm2.rows(24, 2)
    return [{"input_ids": part[:, :64]} for part in np.split(known, 4)], [{"input_ids": new[:, :32]}]


def test_every_layer_is_found(smollm2_beginning):
    report = bn.plan(smollm2_beginning, {"mode": "ternary", "rules": [HEAD]})
    assert len(report.converted) == 14
    assert [layer.name for layer in report.layers if layer.reason is not None] == ["output"]


def test_attention_in_four_bits_keeps_its_logits_and_data_helps(smollm2_beginning, rows, tmp_path):
    known, new = rows

    def sqnr(recipe, data=None) -> float:
        bn.convert(smollm2_beginning, tmp_path / "out.onnx", recipe, data=data, force=True)
        result = bn.validate(smollm2_beginning, tmp_path / "out.onnx", new, layers=False)
        return result.outputs[0].metrics.sqnr_db

    int4 = {"rules": [HEAD, ("*ffn*", "keep"), {"action": "int4", "granularity": "block:64"}]}
    rounded, calibrated = sqnr(int4), sqnr(int4, known)
    assert calibrated > rounded > 15


def test_onnxruntimes_own_bits_are_counted(smollm2_beginning, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    perplexity = importlib.import_module("perplexity")
    config = perplexity.PEERS["ORT 4-bit block 32, symmetric"]()
    bits = perplexity.peer(config, smollm2_beginning, tmp_path / "peer.onnx")
    assert bits == pytest.approx(4 + 32 / 32, rel=1e-3)
    for recipe in perplexity.OURS.values():
        bn.Recipe.parse(recipe)
