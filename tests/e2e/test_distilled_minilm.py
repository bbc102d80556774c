"""MiniLM in PyTorch, as distill_minilm.py trains it, and what it writes. Needs torch."""

from __future__ import annotations

import copy

import minilm
import numpy as np
import onnx
import pytest

import onnx_bitnet as bn

torch = pytest.importorskip("torch", reason="install the extra [torch]")
import distill_minilm  # noqa: E402

from onnx_bitnet.torch import Settings, distill, to_bitlinear  # noqa: E402

SENTENCES = ["A generator is resumed by its next method.", "Lists are sorted in place."]


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    if minilm.path() is None:
        pytest.skip("install models/requirements.txt")
    return distill_minilm.MiniLM(minilm.tensors())


@torch.no_grad()
def test_it_is_the_network_of_the_graph(teacher, minilm_model, run_stock):
    _, expected = run_stock(minilm_model, minilm.tokenize(SENTENCES))
    embeddings = distill_minilm.embed(teacher, distill_minilm.tokens_of(SENTENCES))
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_what_it_writes_converts_losslessly_and_embeds_as_trained(teacher, tmp_path):
    student = copy.deepcopy(teacher)
    assert len(to_bitlinear(student, granularity="block:128", scale="learned")) == 36
    settings = Settings(2, match=("encoder.layer.?",), bfloat16=True)
    distill(student, teacher, distill_minilm.Batches(SENTENCES * 4), settings)
    onnx.save(distill_minilm.build(student), tmp_path / "float.onnx")
    float_model, feeds = tmp_path / "float.onnx", minilm.tokenize(SENTENCES)
    exact = bn.convert(float_model, tmp_path / "exact.onnx", bn.Recipe(activation_bits=32))
    assert exact.lossless
    assert [layer.granularity for layer in exact.converted] == ["block:128"] * 36
    bn.convert(float_model, tmp_path / "packed.onnx", bn.Recipe(activation_bits=8))

    trained, unrounded = distill_minilm.frozen(student), distill_minilm.frozen(student)
    for module in unrounded.modules():
        if hasattr(module, "activation_bits"):
            module.activation_bits = 32
    for file, network, least in (("exact", unrounded, 1 - 1e-6), ("packed", trained, 0.99)):
        _, embeddings = bn.session(tmp_path / f"{file}.onnx").run(None, feeds)
        expected = distill_minilm.embed(network, distill_minilm.tokens_of(SENTENCES)).numpy()
        # torch sums in another order: where that rounds one activation to the other side, the next layers
        # round more of them otherwise, until the difference is that of 8 bits to none.
        assert (embeddings * expected).sum(axis=1).min() > least


def test_evaluation_sentences_are_not_learned_from():
    sentences = distill_minilm.texts([])
    assert len(sentences) > 5000
    assert not any(held_out in sentence for held_out in minilm.sentences()[1] for sentence in sentences)
