"""A bfloat16 graph in float32: what changes, what stays, and that onnxruntime runs it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from ml_dtypes import bfloat16
from rewrite.graphs import build, numbers
from rewrite.steps import Outputs, initializers, ops, reference, stock

from onnx_bitnet.rewrite.bfloat16 import widen

ROW = {"c": numbers(4).astype(bfloat16)}


def widened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    graph = ir.from_proto(model)
    changed = widen(graph)
    proto: onnx.ModelProto = ir.to_proto(graph)
    onnx.checker.check_model(proto)
    return proto, changed


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> Outputs:
    return stock(model, feeds, optimize=False)


def test_ends_activations_and_casts_are_float32():
    before = build(
        """g (bfloat16[b, 4] x, float[4] f) => (bfloat16[b, 4] y, float[b, 4] z) {
            g16 = Cast <to = 16> (f)
            s = Add (x, g16)
            y = Mul (s, c)
            z = Cast <to = 1> (s)
        }""",
        ROW,
    )
    after, changed = widened(before)
    assert changed
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in (*after.graph.input, *after.graph.output)
    }
    assert kinds == dict.fromkeys("xfyz", onnx.TensorProto.FLOAT)
    assert initializers(after)["c"].dtype == bfloat16
    x, f = numbers(2, 4), numbers(4, seed=3)
    for one, other in zip(
        run(after, x=x, f=f), reference(before, {"x": x.astype(bfloat16), "f": f}), strict=True
    ):
        np.testing.assert_array_equal(one, other.astype(np.float32))


def test_a_constant_is_cast_once_where_it_is_read():
    before = build("g (bfloat16[4] x) => (bfloat16[4] y) { a = Mul (x, c) \n y = Add (a, c) }", ROW)
    after, _ = widened(before)
    assert ops(after) == ["Cast", "Mul", "Add"]
    np.testing.assert_array_equal(run(after, x=numbers(4))[0], numbers(4) * numbers(4) + numbers(4))


def test_a_constant_subgraph_still_rounds():
    before = build(
        """g (bfloat16[4] x) => (bfloat16[4] y) {
            third = Div (one, three)
            rounded = Cast <to = 16> (third)
            less = Sub (rounded, tiny)
            y = Mul (x, less)
        }""",
        {"one": np.float32(1), "three": np.float32(3), "tiny": np.zeros((), bfloat16)},
    )
    after, _ = widened(before)
    expected = np.float32(bfloat16(1 / 3))
    np.testing.assert_array_equal(run(after, x=np.ones(4, np.float32))[0], np.full(4, expected))


def test_subgraphs_functions_and_filled_shapes():
    before = build(
        """g (bool p, bfloat16[4] x) => (bfloat16[4] y) {
            d = local.Twice (x)
            n = Shape (d)
            zeros = ConstantOfShape <value = bfloat16[1] {16256}> (n)
            e = Add (d, zeros)
            y = If (p) <
                then_branch = t () => (bfloat16[4] u) { u = Add (e, c) },
                else_branch = e () => (bfloat16[4] v) { v = Identity (e) }
            >
        }""",
        ROW,
        domains=["local"],
        functions="""<domain: "local", opset_import: ["" : 18]>
        Twice (x) => (y) { two = Constant <value = bfloat16 {16384}> () \n y = Mul (x, two) }""",
    )
    after, _ = widened(before)
    x = numbers(4)
    np.testing.assert_array_equal(run(after, x=x, p=np.array(True))[0], 2 * x + 1 + numbers(4))
    np.testing.assert_array_equal(run(after, x=x, p=np.array(False))[0], 2 * x + 1)


def test_a_constant_output_is_float32():
    after, _ = widened(build("g (bfloat16[4] x) => (bfloat16[4] y, bfloat16[4] c) { y = Neg (x) }", ROW))
    y, c = run(after, x=numbers(4))
    np.testing.assert_array_equal(c, numbers(4))
    assert y.dtype == c.dtype == np.float32


def test_a_float32_graph_with_bfloat16_weights_stays_as_it_is():
    before = build("g (float[4] x) => (float[4] y) { w = Cast <to = 1> (c) \n y = Mul (x, w) }", ROW)
    after, changed = widened(before)
    assert not changed
    assert after.graph == ir.to_proto(ir.from_proto(before)).graph
