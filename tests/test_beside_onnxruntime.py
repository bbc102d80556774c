"""Our op beside onnxruntime's own 8-bit one: with AMX, both configure the tiles of the same threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import packed
import pytest
from onnx import helper, numpy_helper
from sessions import assert_same_bits, open_model

import onnx_bitnet as bn
from onnx_bitnet import _native

K = N = 192
ROWS = (1, 4, 5, 33, 128)


def theirs(x: str, y: str) -> onnx.NodeProto:
    inputs = [x, "b", "b_scale", "b_zero_point"]
    return helper.make_node("DynamicQuantizeMatMul", inputs, [y], domain="com.microsoft")


def constants(rng: np.random.Generator) -> list[onnx.TensorProto]:
    tensors = {
        "b": rng.integers(-128, 128, (K, N)).astype(np.int8),
        "b_scale": np.float32([0.01]),
        "b_zero_point": np.int8([0]),
    }
    return [numpy_helper.from_array(value, name) for name, value in tensors.items()]


def models() -> tuple[packed.Layer, onnx.ModelProto, onnx.ModelProto]:
    """Return our layer, theirs alone, and theirs before and after ours in one model."""
    rng = np.random.default_rng(0)
    layer = packed.random_layer(rng, N, K, bits=8)

    def model(nodes: list[onnx.NodeProto], ours: bool) -> onnx.ModelProto:
        made = packed.model(
            nodes,
            [*constants(np.random.default_rng(1)), *(layer.initializers() if ours else [])],
            [packed.value("x", np.float32, ["m", K])],
            [packed.value(node.output[0], np.float32, ["m", N]) for node in nodes],
            with_function=ours,
        )
        made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return made

    alone = model([theirs("x", "before")], ours=False)
    beside = model([theirs("x", "before"), layer.node("x", "y"), theirs("y", "after")], ours=True)
    return layer, alone, beside


def test_in_one_session() -> None:
    layer, alone, beside = models()
    session, other = open_model(beside, 2), open_model(alone, 2)
    for m in ROWS:
        x = packed.rows(m, (m, K))
        before, y, after = session.run(["before", "y", "after"], {"x": x})
        assert_same_bits(y, layer.expected(x))
        assert_same_bits(before, other.run(None, {"x": x})[0])
        assert_same_bits(after, other.run(None, {"x": y})[0])


def test_in_concurrent_sessions() -> None:
    layer, alone, beside = models()
    cases = [(x, layer.expected(x)) for x in (packed.rows(m, (m, K)) for m in ROWS)]
    other = open_model(alone, 2)
    wanted = [(x, other.run(None, {"x": x})[0], y, other.run(None, {"x": y})[0]) for x, y in cases]
    sessions = [open_model(model, threads) for model in (alone, beside) for threads in (1, 2)]

    def work(turn: int) -> None:
        x, *want = wanted[turn % len(wanted)]
        for got, expected in zip(sessions[turn % len(sessions)].run(None, {"x": x}), want, strict=False):
            assert_same_bits(got, expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(200)))


def test_amx_is_what_ran() -> None:
    if "amx" not in _native.allowed_isas():
        pytest.skip("no AMX here, or not allowed: the tests above ran without")
    assert {kernel.isa for kernel in bn.kernels() if kernel.chosen and kernel.op == "dot"} == {"amx"}
