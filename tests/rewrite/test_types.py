"""The type of a value that no one states follows from what it is computed from."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
import pytest

from onnx_bitnet.rewrite import types
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


def test_no_value_is_looked_at_for_each_of_those_behind_it(monkeypatch):
    names = ["x", *(f"y{i}" for i in range(200))]
    body = " ".join(f"{after} = Relu ({before})" for before, after in pairwise(names))
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float16[2] x) => (float[2] out) {{
        {body} out = NonZero ({names[-1]}) }}"""
    looks = []
    own_type = types._own_type
    monkeypatch.setattr(types, "_own_type", lambda value: looks.append(value) or own_type(value))
    outputs = [output for node in ir.from_onnx_text(text).graph for output in node.outputs][:-1]
    assert {element_type(value) for value in outputs} == {ir.DataType.FLOAT16}
    assert len(looks) <= 2 * len(outputs)
