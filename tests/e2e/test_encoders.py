"""Encoders of BitLinear layers, as BERT and Qwen are: all packed, the same bits, batches and masks right."""

from __future__ import annotations

import dataclasses

import encoders
import numpy as np
import onnx
import pytest

import onnx_bitnet as bn

TINY = {
    "bert": encoders.Geometry("bert", 2, hidden=48, ffn=96, heads=3, kv_heads=3, vocabulary=50, positions=40),
    "qwen": encoders.Geometry("qwen", 2, hidden=64, ffn=80, heads=4, kv_heads=2, vocabulary=50, positions=40),
}
LENGTHS = [9, 40, 1, 23]


def converted(folder, of):
    onnx.save(encoders.build(of), folder / "float.onnx")
    return bn.convert(folder / "float.onnx", folder / "packed.onnx")


def results(path, feeds, threads=1):
    return bn.session(path, threads=threads).run(None, feeds)


@pytest.mark.parametrize("kind", ["bert", "qwen"])
@pytest.mark.parametrize("real", [False, True], ids=["tiny", "of real width"])
def test_every_layer_is_packed_and_the_results_are_the_same_bits(tmp_path, kind, real):
    base = dataclasses.replace(encoders.GEOMETRIES[kind], layers=1, vocabulary=500) if real else TINY[kind]
    report = converted(tmp_path, base)
    assert report.lossless
    names = {f"layer.{index}.{name}" for index in range(base.layers) for name in base.linear()}
    packed = [layer for layer in report.layers if layer.reason is None]
    assert {layer.name for layer in packed} == names  # attention's own products have no weights
    assert {layer.activation_bits for layer in packed} == {8}
    feeds = encoders.feeds(base, [130, 64] if real else LENGTHS)
    expected, got = (results(tmp_path / name, feeds) for name in ("float.onnx", "packed.onnx"))
    assert all(np.array_equal(*pair) for pair in zip(expected, got, strict=True))
    again = results(tmp_path / "packed.onnx", feeds, threads=2)
    assert all(np.array_equal(*pair) for pair in zip(again, got, strict=True))


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_a_text_has_its_embedding_whatever_is_beside_it(tmp_path, kind):
    converted(tmp_path, TINY[kind])
    feeds = encoders.feeds(TINY[kind], LENGTHS)
    _, together = results(tmp_path / "packed.onnx", feeds)
    noise = np.random.default_rng(1).integers(0, 50, feeds["input_ids"].shape) * (1 - feeds["attention_mask"])
    _, padded = results(tmp_path / "packed.onnx", {**feeds, "input_ids": feeds["input_ids"] + noise})
    assert np.array_equal(together, padded)
    for row, length in enumerate(LENGTHS):
        alone = {name: array[row : row + 1, :length] for name, array in feeds.items()}
        (embedding,) = results(tmp_path / "packed.onnx", alone)[1]
        # float noise moves some activations to the next of their 255 steps
        assert embedding @ together[row] > 0.999
