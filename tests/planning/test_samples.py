"""The data of a search: a fourth judges what the rest was rounded by, however the data comes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.planning.samples import apart


def model(**shapes: list[int | str]) -> ir.Model:
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    ]
    return ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}), ir_version=10)


def column(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)[:, None]


def numbers(feeds: object) -> list[float]:
    return sorted(float(x) for batch in feeds for x in batch["x"].ravel())


def test_every_fourth_batch_judges():
    feeds = open_feeds(model(x=["n", 1]), [{"x": column(i)} for i in range(8)])
    samples = apart(feeds)
    assert numbers(samples.checks) == [2, 6]
    assert numbers(samples.known) == [0, 1, 3, 4, 5, 7]
    assert samples.apart


@pytest.mark.parametrize("batches", [1, 3])
def test_of_few_batches_every_fourth_sample_judges(batches):
    data = [{"x": column(*range(32 * i, 32 * i + 32)), "y": column(*range(32))} for i in range(batches)]
    samples = apart(open_feeds(model(x=["n", 1], y=["n", 1]), data))
    assert samples.apart
    assert numbers(samples.checks) == [4 * i + 2 for i in range(8 * batches)]
    assert sorted(numbers(samples.checks) + numbers(samples.known)) == list(range(32 * batches))
    assert all(len(batch["x"]) == len(batch["y"]) for batch in samples.known)
    assert numbers(samples.everything) == list(range(32 * batches))


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ({"x": [32, 1]}, 32),  # of this size alone
        ({"x": ["n", 1]}, 31),  # too few
        ({"x": ["n", 1], "y": ["m", 1]}, 32),  # which may be another size
        ({"x": ["n", 1], "y": []}, 32),
    ],
)
def test_what_cannot_be_cut_is_all_for_both(shapes, rows):
    batch = {
        name: np.zeros([rows if i == 0 else 1 for i, _ in enumerate(s)], np.float32)
        for name, s in shapes.items()
    }
    samples = apart(open_feeds(model(**shapes), batch))
    assert not samples.apart
    assert samples.known is samples.everything
