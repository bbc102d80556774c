"""Stages: values computed from where the last run ended are those of a run of the whole model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import parser

from onnx_bitnet.conversion import stages
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.data.replay import replayed
from onnx_bitnet.runner import start

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x, bool deep) => (float[n, 4] y)
<float[4] one = {1, 1, 1, 1}, int64[1] two = {2}, int64[1] axis = {1}>
{
    a = Add (x, one)
    parts = SplitToSequence <axis = 1, keepdims = 1> (a)
    b = Mul (a, a)
    c = If (deep) <
        then_branch = t () => (float[n, 4] p) { p = Add (a, b) },
        else_branch = e () => (float[n, 4] q) { q = Identity (b) }
    >
    d = ConcatFromSequence <axis = 1> (parts)
    y = Mul (c, d)
}
"""


def test_values_are_those_of_whole_runs(tmp_path, monkeypatch):
    """Through a branch that reads values from outside, and a sequence, which cannot be fed."""
    proto = parser.parse_model(TEXT)
    path = tmp_path / "in.onnx"
    onnx.save(proto, path)
    generator = np.random.default_rng(0)
    data = [
        {"x": generator.standard_normal((rows, 4), np.float32), "deep": np.array(rows > 2)} for rows in (2, 3)
    ]
    names = ["x", "a", "b", "c", "y"]
    whole = ir.from_proto(proto)
    known = {value.name: value for node in whole.graph for value in node.outputs}
    whole.graph.outputs[:] = [known[name] for name in names[1:]]
    given = []
    start_part = stages.start_part
    monkeypatch.setattr(stages, "start_part", lambda *args: given.append(set(args[4])) or start_part(*args))
    model = ir.from_proto(proto)
    with replayed(open_feeds(model, data)) as feeds:
        course = stages.Stages(model, path, feeds, 1, _folder(tmp_path))
        got = {name: list(course.run(name, names[index + 1 :])) for index, name in enumerate(names)}
    runner = start(whole, path)
    for index, batch in enumerate(data):
        expected = batch | runner.run(names[1:], batch, "a batch")
        for name in names:
            np.testing.assert_array_equal(got[name][index], expected[name])
    assert given[-1] == {"a", "c"}, "only what is still needed is kept"


def _folder(tmp_path):
    folder = tmp_path / "stages"
    folder.mkdir()
    return folder
