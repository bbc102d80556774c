"""Activations whose rank is not stated: it is inferred where a layer needs it, and nothing else is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrite.graphs import K, N, build, numbers, ternary
from rewrite.steps import convert, ops, reference, with_library

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Refusal
from onnx_bitnet.rewrite.scan import prepare, scan

HIDDEN = {
    "left": ("y = MatMul (W, h)", (N, K), (2, K, 3)),
    "unit batch": ("y = MatMul (h, W)", (1, K, N), (4, K)),
    "ellipsis": ('y = Einsum <equation = "...d,dn->...n"> (h, W)', (K, N), (2, 3, K)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_rank_is_inferred(name: str):
    layer, weight, shape = HIDDEN[name]
    model = build(
        f"g (float[{','.join(map(str, shape))}] x) => (float[] y) {{ h = Relu (x) \n {layer} }}",
        {"W": ternary(*weight)},
    )
    converted = convert(model)
    assert "MatMulI2S" in ops(converted)
    feeds = {"x": numbers(*shape)}
    np.testing.assert_allclose(
        with_library(converted, feeds)[0], reference(model, feeds)[0], rtol=1e-5, atol=1e-5
    )


def test_only_what_is_needed_is_stated():
    model = ir.from_proto(
        build(
            f"g (float[2, {K}, 3] x) => (float[] y) {{ h = Relu (x) \n z = MatMul (W, h) \n y = Neg (z) }}",
            {"W": ternary(N, K)},
        )
    )
    prepare(model)
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    assert shapes["h"] == [2, K, 3]
    assert shapes["z"] is None


def test_what_cannot_be_inferred_is_refused():
    proto = build(
        "g (float[2, 3] x) => (float[] y) { h = some.domain.Op (x) \n y = MatMul (W, h) }",
        {"W": ternary(N, K)},
        domains=["some.domain"],
    )
    model = ir.from_proto(proto)
    prepare(model)
    (found,) = scan(model)
    assert isinstance(found, Refusal)
    assert (found.reason, found.detail) == (Reason.RANK_UNKNOWN, "the rank of 'h' is not stated")
