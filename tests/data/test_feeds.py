"""Feeds: every kind of data is read batch by batch, and every mistake is one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_bitnet.data.feeds import Feeds, open_feeds
from onnx_bitnet.errors import DataError

Batch = dict[str, np.ndarray]


def model(*inputs: onnx.ValueInfoProto, nodes=(), initializers=()) -> ir.Model:
    graph = helper.make_graph(list(nodes), "g", list(inputs), [], list(initializers))
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def value(name: str, kind: int = TensorProto.FLOAT, shape=("n", 3)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


TWO = model(value("x"), value("ids", TensorProto.INT64, ["n"]))


def batch(rows: int = 2) -> Batch:
    return {"x": np.full((rows, 3), rows, np.float32), "ids": np.arange(rows)}


def same(feeds: Feeds, batches: list[Batch]) -> None:
    got = list(feeds)
    assert len(got) == len(batches)
    for one, other in zip(got, batches, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def write_set(folder: Path, *arrays: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, array in enumerate(arrays):
        (folder / f"input_{index}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    return folder


# Kinds of data


def test_an_npz_is_one_batch(tmp_path):
    np.savez(tmp_path / "feeds.npz", **batch())
    for path in (tmp_path / "feeds.npz", str(tmp_path / "feeds.npz")):
        feeds = open_feeds(TWO, path)
        assert (feeds.count, feeds.random) == (1, False)
        assert feeds.description == str(path)
        same(feeds, [batch()])
        same(feeds, [batch()])


def test_a_folder_of_npz_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 1):
        np.savez(tmp_path / f"part{number}.npz", **batch(number))
    feeds = open_feeds(TWO, tmp_path)
    assert feeds.description == f"3 .npz of {tmp_path}"
    same(feeds, [batch(1), batch(9), batch(10)])


def test_onnx_test_data_sets_follow_the_order_of_the_inputs(tmp_path):
    for number in (10, 2):
        write_set(tmp_path / f"test_data_set_{number}", *batch(number).values())
    feeds = open_feeds(TWO, tmp_path)
    assert (feeds.count, feeds.description) == (2, f"2 ONNX test data sets of {tmp_path}")
    same(feeds, [batch(2), batch(10)])
    single = open_feeds(TWO, tmp_path / "test_data_set_2")
    assert single.description == f"1 ONNX test data set of {tmp_path / 'test_data_set_2'}"
    same(single, [batch(2)])


def test_test_data_sets_skip_initializers_that_are_inputs_too(tmp_path):
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    old = model(value("w", shape=[2]), value("x"), initializers=[weight])
    same(open_feeds(old, write_set(tmp_path / "set", batch()["x"])), [{"x": batch()["x"]}])


def test_a_dict_is_one_batch_and_an_iterable_of_dicts_many():
    same(open_feeds(TWO, batch()), [batch()])
    feeds = open_feeds(TWO, [batch(1), batch(2)])
    assert (feeds.count, feeds.description) == (2, "a list of batches")
    same(feeds, [batch(1), batch(2)])
    same(feeds, [batch(1), batch(2)])


def test_a_generator_is_read_once_and_one_batch_at_a_time():
    produced = 0

    def generate() -> Iterator[Batch]:
        nonlocal produced
        for rows in (1, 2, 3):
            produced += 1
            yield batch(rows)

    feeds = open_feeds(TWO, generate())
    assert (feeds.count, produced) == (0, 0)
    for number, got in enumerate(feeds, start=1):
        assert (produced, len(got["ids"])) == (number, number)
    with pytest.raises(
        DataError, match="a generator of batches: no batches; a generator that was used before"
    ):
        list(feeds)


def test_a_calibration_reader_is_read_to_its_end():
    class Reader:
        def __init__(self) -> None:
            self.left = [batch(1), batch(2)]

        def get_next(self) -> Batch | None:
            return self.left.pop(0) if self.left else None

    feeds = open_feeds(TWO, Reader())
    assert feeds.description == "a Reader"
    same(feeds, [batch(1), batch(2)])


def test_a_calibration_reader_is_rewound():
    class Reader:
        def rewind(self) -> None:
            self.left = [batch(1)]

        def get_next(self) -> Batch | None:
            return self.left.pop() if self.left else None

    feeds = open_feeds(TWO, Reader())
    same(feeds, [batch(1)])
    same(feeds, [batch(1)])


def test_scalars_strings_and_overridable_initializers_are_fed():
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    odd = model(
        value("rate", TensorProto.INT64, []),
        value("text", TensorProto.STRING, ["n"]),
        value("w", shape=[2]),
        initializers=[weight],
    )
    (got,) = open_feeds(odd, {"rate": 16000, "text": ["a", "bc"]})
    assert (got["rate"].shape, got["rate"].dtype, int(got["rate"])) == ((), np.int64, 16000)
    assert (got["text"].dtype, got["text"].tolist()) == (np.dtype(object), ["a", "bc"])
    (got,) = open_feeds(odd, {"rate": 1, "text": ["a"], "w": np.zeros(2, np.float32)})
    assert got["w"].tolist() == [0, 0]


# Mistakes


def message(data: object, of: ir.Model = TWO, **options) -> str:
    with pytest.raises(DataError) as caught:
        list(open_feeds(of, data, **options))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"idx": 1},
            "data, batch 1: the model has no input 'idx'; did you mean 'ids'? its inputs are x, ids",
        ),
        ({"labels": 1}, "data, batch 1: the model has no input 'labels'; its inputs are x, ids"),
        ({"ids": None}, "data, batch 1: input 'ids' is missing; add it as int64 [n]"),
        (
            {"x": np.zeros((2, 3))},
            "data, batch 1: input 'x' is float64, the model takes float32; use .astype('float32')",
        ),
        (
            {"x": np.zeros(3, np.float32)},
            "data, batch 1: input 'x' has shape [3], the model takes [n, 3]; reshape, pad or cut it",
        ),
        (
            {"x": np.zeros((2, 4), np.float32)},
            "data, batch 1: input 'x' has shape [2, 4], the model takes [n, 3]; reshape, pad or cut it",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_named(change, text):
    wrong = {name: array for name, array in (batch() | change).items() if array is not None}
    assert message([batch(), wrong]) == text


def test_a_ragged_list_is_no_array():
    assert message({"x": [[1, 2], [3]], "ids": [1, 2]}).startswith(
        "data: input 'x': cannot be made a NumPy array: setting an array element"
    )


def test_things_that_hold_no_batches():
    assert message(3).startswith("data: a int holds no feeds; give an .npz, a folder of them")
    assert message([np.ones(3)]) == "data, batch 0: a ndarray, not a dict of {input name: array}; make it one"
    assert message([]).startswith("a list of batches: no batches;")


def test_dims_with_data_are_refused():
    assert message(batch(), dims={"n": 3}).startswith(
        "dims ['n'] are sizes for random feeds, but data is given"
    )


def test_inputs_that_are_no_tensors_are_refused():
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    sequence = model(helper.make_value_info("s", kind))
    assert message({"s": []}, sequence).startswith(
        "data: input 's' of the model is no tensor; only models with"
    )
    assert message(None, sequence).endswith("no random feeds can be made for it; give data")


def test_files_that_are_not_there_or_not_data(tmp_path):
    missing = tmp_path / "no.npz"
    assert message(missing).startswith(f"{missing}: no such file or folder; give an .npz")
    assert message(tmp_path).startswith(
        f"{tmp_path}: the folder has neither .npz files nor ONNX test data sets;"
    )
    np.save(tmp_path / "one.npy", np.ones(3))
    assert message(tmp_path / "one.npy").startswith(f"{tmp_path / 'one.npy'}: a single array, not an .npz;")


def test_damaged_npz_files(tmp_path):
    np.savez(tmp_path / "good.npz", **batch())
    good = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], object))
    damaged = {
        "empty": b"",
        "text": b"x,ids\n1,2\n",
        "cut": good[: len(good) // 2],
        "flipped": good.replace(np.full((2, 3), 2, np.float32).tobytes(), bytes(24)),
        "pickle": (tmp_path / "pickle.npz").read_bytes(),
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        text = message(path)
        assert text.startswith(f"{path}: cannot be read as .npz: "), text
        assert text.endswith("; write it with np.savez"), text


def test_damaged_test_data_sets(tmp_path):
    folder = write_set(tmp_path / "test_data_set_0", *batch().values())
    (folder / "input_1.pb").write_bytes(b"\xff\xff")
    assert message(tmp_path).startswith(f"{folder / 'input_1.pb'}: not a tensor in ONNX format: ")
    outside = TensorProto(data_type=TensorProto.INT64, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/hostname")
    (folder / "input_1.pb").write_bytes(outside.SerializeToString())
    assert "its data is in another file" in message(tmp_path)
    (folder / "input_1.pb").unlink()
    assert message(tmp_path) == f"{folder}: input 'ids' is missing; add it as int64 [n]"
    (folder / "input_2.pb").write_bytes(b"")
    assert message(tmp_path).startswith(
        f"{folder / 'input_2.pb'}: the model has no input number 2, it has 2;"
    )


# Random feeds


def test_random_feeds_fill_in_symbols_and_are_the_same_each_time():
    shapes = model(
        value("x", shape=["batch", "seq", 3]),
        value("half", TensorProto.FLOAT16, ["batch", None]),
        value("past", shape=["past", "batch"]),
        value("flag", TensorProto.BOOL, ["seq"]),
        value("attention_mask", TensorProto.INT64, ["batch", "past + seq + 1"]),
        value("position_ids", TensorProto.INT64, ["batch", "seq"]),
        value("kind", TensorProto.INT32, []),
    )
    feeds = open_feeds(shapes)
    assert feeds.random
    assert feeds.count == 4
    assert feeds.description.startswith(
        "4 batches of random feeds (seed 0): x float32 [2, 16, 3], half float16 [2, 16]"
    )
    first, *rest = feeds
    assert len(rest) == 3
    assert first["x"].shape == (2, 16, 3)
    assert first["past"].shape == (2, 2)
    assert first["flag"].tolist() == [True] * 16
    assert first["attention_mask"].tolist() == [[1] * 19] * 2
    assert first["position_ids"].tolist() == [list(range(16))] * 2
    assert (first["kind"].shape, first["kind"].dtype) == ((), np.int32)
    same(feeds, [first, *rest])
    assert not np.array_equal(first["x"], rest[0]["x"])
    assert not np.array_equal(first["x"], next(iter(open_feeds(shapes, seed=1)))["x"])


def test_dims_override_symbols():
    feeds = open_feeds(model(value("x", shape=["n", None, "m"])), dims={"n": 5, "x:1": 7})
    assert next(iter(feeds))["x"].shape == (5, 7, 16)
    assert message(None, TWO, dims={"m": 5}) == "dims: the model has no symbolic dimension 'm'; it has n"
    assert message(None, TWO, dims={"n": 0}) == "dims: n = 0 leaves nothing to feed; give at least 1"
    assert message(None, TWO, dims={"n": "3"}) == "dims: n = '3' leaves nothing to feed; give at least 1"


def test_random_indices_are_legal_in_every_table_they_look_up():
    tables = [
        numpy_helper.from_array(np.zeros((50, 4), np.float32), "wide"),
        numpy_helper.from_array(np.zeros((4, 7), np.float16), "small"),
        numpy_helper.from_array(np.zeros((5, 4), np.float32), "places"),
    ]
    nodes = [
        helper.make_node("Gather", ["wide", "ids"], ["a"]),
        helper.make_node("Cast", ["ids"], ["ids32"], to=TensorProto.INT32),
        helper.make_node("Cast", ["small"], ["small32"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["small32", "ids32"], ["b"], axis=1),
        helper.make_node("Gather", ["places", "position_ids"], ["c"]),
    ]
    lookup = model(
        value("ids", TensorProto.INT64, ["batch", 999]),
        value("position_ids", TensorProto.INT64, [1, 12]),
        nodes=nodes,
        initializers=tables,
    )
    first = next(iter(open_feeds(lookup)))
    assert set(first["ids"].flat) == set(range(7))
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]


def test_strings_and_unknown_ranks_have_no_random_feeds():
    text = message(None, model(value("t", TensorProto.STRING, ["n"])))
    assert text == "input 't' is object [n]: no random feeds can be made for it; give data"
    text = message(None, model(value("x", shape=None)))
    assert text == "input 'x' is float32 of any shape: no random feeds can be made for it; give data"
