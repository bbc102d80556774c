"""Ops of onnxruntime in the place of layers: nothing is left that no op reads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary
from written import run

import onnx_bitnet as bn

FEEDS = [{"x": np.random.default_rng(0).standard_normal((16, K), np.float32)}]


def unread(path) -> set[str]:
    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input}
    return {tensor.name for tensor in graph.initializer} - read


@pytest.mark.parametrize("target", ["ort", "simulate"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_bias_that_data_shifts_is_stored_once(tmp_path, target, beta):
    path = chain(tmp_path / "in.onnx", {"a": ordinary(K)})
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(
        onnx.helper.make_node("Gemm", ["x", "a", "c"], ["a.y"], name="layer.a", beta=beta)
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(ordinary(K, 1)[0], "c"))
    onnx.save(model, path)
    bn.convert(path, tmp_path / "out.onnx", {"mode": "ternary", "target": target}, data=FEEDS)
    assert unread(tmp_path / "out.onnx") == set()
    assert len(onnx.load(tmp_path / "out.onnx").graph.initializer) == (3 if target == "ort" else 2)
    (got,), (want,) = run(tmp_path / "out.onnx", FEEDS[0]), run(path, FEEDS[0])
    assert np.abs((got - want).mean(axis=0)).max() < 1
