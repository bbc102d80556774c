"""MiniLM distilled from its ONNX file alone, as distill_minilm.py does it. Needs torch."""

from __future__ import annotations

import minilm
import numpy as np
import onnx
import pytest

import onnx_bitnet as bn

pytest.importorskip("torch", reason="install the extra [torch]")
import distill_minilm

SENTENCES = ["A generator is resumed by its next method.", "Lists are sorted in place."]


def test_what_it_writes_converts_losslessly_and_embeds_as_trained(minilm_model, tmp_path, run_stock):
    ternary, feeds = tmp_path / "ternary.onnx", minilm.tokenize(SENTENCES)
    done = distill_minilm.distil(minilm_model, ternary, distill_minilm.Batches(SENTENCES * 4), steps=2)
    assert len(done.layers) == 36
    assert not done.left
    report = bn.convert(ternary, tmp_path / "packed.onnx", bn.Recipe(mode="lossless"))
    assert report.lossless
    assert {(x.granularity, x.scale_type, x.activation_bits) for x in report.converted} == {
        ("block:128", "float16", 8)
    }
    old, new = onnx.load(minilm_model), onnx.load(ternary)
    names = {node.name for node in new.graph.node}
    biases = {f"{name}.add" for name in done.layers}
    assert {node.name for node in old.graph.node} - names == biases
    _, expected = run_stock(ternary, feeds)
    _, embeddings = bn.session(tmp_path / "packed.onnx").run(None, feeds)
    # Sums are rounded otherwise: where that sends one activation to the other side, the next layers round
    # more of them otherwise, until the difference is that of 8 bits to none.
    assert (embeddings * expected).sum(axis=1).min() > 0.99


def test_its_batches_are_sentences_of_one_length():
    batches = list(distill_minilm.Batches(SENTENCES * 4))
    assert len(batches) == 2
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["input_ids"]) == 4
        assert np.all(batch["attention_mask"] == 1)


def test_evaluation_sentences_are_not_learned_from():
    sentences = distill_minilm.texts([])
    assert len(sentences) > 5000
    assert not any(held_out in sentence for held_out in minilm.sentences()[1] for sentence in sentences)
