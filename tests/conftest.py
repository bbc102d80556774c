"""Fixtures: the real models, each made once per run, or a skip that says what to install."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import digits
import installed
import minilm
import numpy as np
import ocr
import onnx
import orientation
import pytest
import smollm2
import vad
from chains import K, chain, ordinary, ternary

# No test finds what another one, or the user, has measured; those about the cache choose a folder.
os.environ["ONNX_BITNET_CACHE"] = "off"


def _wheel(path: Path | None) -> Path:
    if path is None:
        pytest.skip("install models/requirements.txt")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def digits_parameters() -> digits.Parameters:
    pytest.importorskip("sklearn", reason="install the extra [test]")
    return digits.train(digits.splits()[0])


@pytest.fixture(scope="session")
def digits_model(digits_parameters: digits.Parameters, model_folder: Path) -> Path:
    path = model_folder / "digits.onnx"
    onnx.save(digits.build(digits_parameters), path)
    return path


@pytest.fixture(scope="session")
def minilm_model(model_folder: Path) -> Path:
    _wheel(minilm.path())
    path = model_folder / "minilm.onnx"
    onnx.save(minilm.build(), path)
    return path


@pytest.fixture(scope="session")
def minilm_ternary_model(model_folder: Path) -> Path:
    """MiniLM with weights that are exactly ternary per output channel."""
    _wheel(minilm.path())
    path = model_folder / "minilm-ternary.onnx"
    onnx.save(minilm.build(ternary=True), path)
    return path


@pytest.fixture(scope="session")
def minilm_feeds() -> dict[str, np.ndarray]:
    """Return twelve real sentences, cut and padded to 32 tokens."""
    _wheel(minilm.path())
    return minilm.tokenize(minilm.sentences()[1][:12], length=32)


@pytest.fixture(scope="session")
def ocr_model() -> Path:
    return _wheel(ocr.path())


@pytest.fixture(scope="session")
def orientation_model() -> Path:
    return _wheel(orientation.path())


@pytest.fixture(scope="session")
def smollm2_model(model_folder: Path) -> Path:
    """All of it: 539 MB."""
    _wheel(smollm2.path())
    path = model_folder / "smollm2.onnx"
    onnx.save(smollm2.build(), path)
    return path


@pytest.fixture(scope="session")
def smollm2_beginning(model_folder: Path) -> Path:
    """SmolLM2 with two of its thirty layers."""
    _wheel(smollm2.path())
    path = model_folder / "smollm2-beginning.onnx"
    onnx.save(smollm2.build(layers=2), path)
    return path


@pytest.fixture(scope="session")
def vad_model() -> Callable[[str], Path]:
    return lambda variant: _wheel(vad.path(variant))


@pytest.fixture(scope="session")
def magika_model() -> Path:
    return _wheel(installed.find("magika", "model.onnx"))


@pytest.fixture(scope="session")
def int8_model() -> Path:
    """An encoder that onnxruntime's tools have quantized: MatMulInteger all over."""
    return _wheel(installed.find("traceforge-title-model", "span/encoder.onnx"))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A ternary, an ordinary, and another ternary layer."""
    return chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ordinary(K), "c": ternary(8, seed=2)})
