"""Networks of convolutions that others exported: torch computes what the file does. Needs torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from written import run

import onnx_bitnet as bn

pytest.importorskip("torch", reason="install the extra [torch]")
from onnx_bitnet.torch import Settings, distill_onnx

SIZES = {"ocr_model": (2, 3, 48, 96), "orientation_model": (2, 3, 224, 224)}


@pytest.mark.parametrize("model", SIZES)
def test_the_loss_in_training_is_that_of_the_file(model, request, tmp_path):
    path, ternary = request.getfixturevalue(model), tmp_path / "ternary.onnx"
    name = onnx.load(path).graph.input[0].name
    feeds = {name: np.random.default_rng(0).normal(size=SIZES[model]).astype(np.float32)}
    # With float activations: rounded to 8 bits, the last bit of a float may soon make 1 % of difference.
    done = distill_onnx(path, ternary, feeds, Settings(1, learning_rate=0.0), activation_bits=32)
    assert not done.left
    (expected,), (got,) = run(path, feeds), run(ternary, feeds)
    spread = expected - expected.reshape(-1, expected.shape[-1]).mean(axis=0)
    loss = np.square(got - expected).sum() / np.square(spread).sum()
    assert done.steps[0].output_loss == pytest.approx(loss, rel=1e-3)
    report = bn.convert(ternary, tmp_path / "packed.onnx", bn.Recipe(mode="lossless"))
    assert report.lossless
    assert len(report.converted) == len(done.layers)
