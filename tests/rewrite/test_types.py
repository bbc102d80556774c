"""The type of a value that no one states follows from what it is computed from."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_bitnet.rewrite.types import element_type


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Transpose (x)", ir.DataType.FLOAT16),
        ("z = Add (x, x) y = Cast <to = 1> (z)", ir.DataType.FLOAT),
        ("z = Transpose (x) y = Where (seen, z, x)", ir.DataType.FLOAT16),  # not that of its condition
        ("z = Constant <value = double {0.0}> () y = Where (seen, z, z)", ir.DataType.DOUBLE),
        ("y = NonZero (x)", None),
    ],
)
def test_types_follow_the_graph(body, expected):
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float16[2, 2] x, bool[2, 2] seen) => (float[2, 2] out) {{ {body} out = Identity (y) }}"""
    model = ir.from_onnx_text(text)
    (y,) = (output for node in model.graph for output in node.outputs if output.name == "y")
    assert element_type(y) == expected
