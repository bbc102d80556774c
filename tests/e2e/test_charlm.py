"""The language model that was trained for this project: from its float export to few bits, the same text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import charlm
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_bitnet as bn
from onnx_bitnet import decoder
from onnx_bitnet.report import Reason, Report

PROMPT = "The with statement is used to "
LENGTH = 60


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("charlm") / "charlm.onnx"
    onnx.save(charlm.build(), path)
    return path


@pytest.fixture(scope="module")
def converted(float_model: Path) -> tuple[Report, Path]:
    path = float_model.with_name("charlm.bitnet.onnx")
    return bn.convert(float_model, path, bn.Recipe(mode="lossless", activation_bits=8)), path


@pytest.fixture(scope="module")
def float_session(float_model: Path) -> ort.InferenceSession:
    return ort.InferenceSession(float_model, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def expected(float_session: ort.InferenceSession) -> str:
    return charlm.generate(float_session, PROMPT, LENGTH)


def test_every_bitlinear_layer_converts_losslessly(converted):
    report, path = converted
    geometry = charlm.Geometry.load()
    assert report.lossless
    assert len(report.converted) == 7 * geometry.num_hidden_layers
    assert {layer.granularity for layer in report.converted} == {"tensor"}
    assert report.reasons() == {
        Reason.WEIGHT_NOT_CONSTANT: 2 * geometry.num_hidden_layers,  # attention
        Reason.NOT_TERNARY: 1,  # the head, tied to the embedding
    }
    assert path.stat().st_size < report.source_bytes / 6


def test_logits_are_the_same_bits(float_session, converted):
    feeds = {"tokens": charlm.tokens(charlm.text()[1])[:512].reshape(4, 128)}
    (expected,) = float_session.run(None, feeds)
    (logits,) = bn.session(converted[1]).run(None, feeds)
    np.testing.assert_array_equal(logits, expected)


def test_perplexity_is_the_same(float_session, converted):
    held_out = charlm.text()[1]
    before = charlm.bits_per_character(float_session, held_out)
    assert charlm.bits_per_character(bn.session(converted[1]), held_out) == pytest.approx(before, rel=1e-6)
    assert before < 2  # a model that knows only how often each character occurs needs 4.6 bits


def test_text_is_the_same_on_every_isa(converted, expected):
    script = (
        "import sys, onnx_bitnet as bn, charlm; model, prompt, length = sys.argv[1:]; "
        "print(charlm.generate(bn.session(model, threads=1), prompt, int(length)), end='')"
    )
    for isa in sorted({kernel.isa for kernel in bn.kernels() if kernel.runs_here}):
        folders = [str(Path(charlm.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"ONNX_BITNET_ISA": isa, "PYTHONPATH": os.pathsep.join(folders)}
        call = [sys.executable, "-c", script, str(converted[1]), PROMPT, str(LENGTH)]
        run = subprocess.run(call, check=True, capture_output=True, text=True, env=environment)
        assert run.stdout == expected, isa


def test_text_is_the_same_without_the_library(converted, expected, run_stock):
    tokens = charlm.tokens(PROMPT + expected)[None]
    (logits,) = run_stock(converted[1], {"tokens": tokens})
    continuation = logits[0, len(PROMPT) - 1 : -1].argmax(axis=-1)
    assert bytes(continuation.tolist()).decode() == expected


def test_decoder_with_a_cache_agrees(float_session, tmp_path):
    decoder.build(charlm.CHECKPOINT, tmp_path / "decoder", decoder.Options(head="float", embedding="float"))
    generator = decoder.Generator(tmp_path / "decoder", threads=1)
    text = PROMPT + "".join(generator.text(PROMPT, LENGTH))
    assert len(text) == len(PROMPT) + LENGTH
    (logits,) = float_session.run(None, {"tokens": charlm.tokens(text)[None]})
    likeliest = logits[0, len(PROMPT) - 1 : -1]
    chosen = charlm.tokens(text)[len(PROMPT) :]
    # Its attention rounds otherwise, so what is likeliest by a hair may differ.
    assert (likeliest.max(axis=-1) - likeliest[np.arange(LENGTH), chosen]).max() < 0.2


def test_text_is_words(expected):
    known = set(charlm.text()[0].split())
    words = expected.split()[1:-1]
    assert np.mean([word in known for word in words]) > 0.7
