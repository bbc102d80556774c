"""Feeds that are run several times are the same each time, wherever they are kept meanwhile."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from onnx_bitnet.data import replay
from onnx_bitnet.data.feeds import open_feeds

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) { y = Identity (x) }
"""


class Refilled:
    """Yields one array that it fills anew for each batch."""

    def __iter__(self):
        x = np.empty((2, 4), np.float32)
        for value in range(5):
            x[:] = value
            yield {"x": x}


@pytest.mark.parametrize("data", [lambda: iter(Refilled()), Refilled])
@pytest.mark.parametrize("room", [0, 80, 1000])
def test_batches_are_the_same_each_time(monkeypatch, data, room):
    monkeypatch.setattr(replay, "_ROOM", room)
    model = ir.from_proto(parser.parse_model(MODEL))
    with replay.replayed(open_feeds(model, data()), max_samples=7) as feeds:
        assert (feeds.count, feeds.samples) == (4, 8)
        assert len(feeds.held) == min(room // 32, 4)
        for _ in range(2):
            assert [batch["x"].tolist() for batch in feeds] == [[[value] * 4] * 2 for value in range(4)]
        again = open_feeds(model, feeds.as_feeds())
        assert [label for label, _ in again.labelled()] == [f"data, batch {index}" for index in range(4)]
        assert (again.count, again.description) == (4, feeds.description)
