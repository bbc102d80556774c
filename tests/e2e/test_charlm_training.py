"""What trains the language model saves what charlm.py builds, and PyTorch exports the same. Needs torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import charlm
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_bitnet as bn

torch = pytest.importorskip("torch", reason="install the extra [torch]")
import train_charlm  # noqa: E402

from onnx_bitnet.torch import freeze  # noqa: E402

TOKENS = charlm.tokens(charlm.text()[1][:96]).reshape(2, 48)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = train_charlm.CharLM(replace(train_charlm.GEOMETRY, num_hidden_layers=1))
    folder = tmp_path_factory.mktemp("charlm")
    train_charlm.save(model, folder)
    return folder, model


def logits(model: ort.InferenceSession) -> np.ndarray:
    return model.run(None, {"tokens": TOKENS})[0]


@torch.no_grad()
def test_the_graph_of_a_checkpoint_computes_what_was_trained(checkpoint, tmp_path):
    folder, model = checkpoint
    onnx.save(charlm.build(folder), tmp_path / "built.onnx")
    built = ort.InferenceSession(tmp_path / "built.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(logits(built), model(torch.from_numpy(TOKENS)).numpy(), atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_what_torch_exports_converts_losslessly_and_computes_the_same(checkpoint, tmp_path):
    pytest.importorskip("onnxscript", reason="install the extra [torch]")
    model = copy.deepcopy(checkpoint[1])
    expected = model(torch.from_numpy(TOKENS)).detach().numpy()
    exported = tmp_path / "exported.onnx"
    torch.onnx.export(
        freeze(model), (torch.from_numpy(TOKENS),), exported, input_names=["tokens"], dynamo=True
    )
    report = bn.convert(exported, tmp_path / "packed.onnx", bn.Recipe(mode="lossless", activation_bits=8))
    assert report.lossless
    assert len(report.converted) == 7
    assert {layer.granularity for layer in report.converted} == {"tensor"}
    np.testing.assert_allclose(logits(bn.session(tmp_path / "packed.onnx")), expected, atol=1e-3)
