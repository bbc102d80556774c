"""Model files and outputs: what is checked on the way in, and that the way out is all or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_bitnet as bn
from onnx_bitnet import files, outputs
from onnx_bitnet.errors import ModelError, OutputError
from onnx_bitnet.runner import start


def linear_model(size: int = 64) -> ir.Model:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["N", size])
    tensor = ir.tensor(np.arange(size * size, dtype=np.float32).reshape(size, size), name="w")
    weight = ir.Value(name="w", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    node = ir.node("MatMul", [x, weight], name="linear")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", size])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=8)


@pytest.fixture
def external(tmp_path):
    """A model with its weights in a file of their own."""
    ir.save(linear_model(), tmp_path / "in.onnx", external_data="in.data", size_threshold_bytes=0)
    return tmp_path / "in.onnx"


def test_read_sums_up_all_files(external):
    file = files.read(external)
    assert file.data_files == {external.with_name("in.data")}
    assert file.nbytes == external.stat().st_size + 64 * 64 * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the model: No such file"),
        (b"", "not an ONNX model"),
        (b"this is not a model", "not a valid ONNX model"),
        (os.urandom(1000), "not a(n| valid) ONNX model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, content, message):
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=f"x.onnx: {message}") as error:
        files.read(path)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="cannot read the model: Is a directory"):
        files.read(tmp_path)


def test_a_cut_off_model_is_refused(tmp_path):
    ir.save(linear_model(), tmp_path / "whole.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "whole.onnx").read_bytes()[:-50])
    with pytest.raises(ModelError, match=r"cut.onnx: not a valid ONNX model"):
        files.read(tmp_path / "cut.onnx")


def sparse_model() -> onnx.ModelProto:
    """A model with a sparse initializer in a branch in a function."""
    branch = onnx.helper.make_graph([], "branch", [], [onnx.ValueInfoProto(name="s")])
    branch.sparse_initializer.add().values.name = "s"
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    proto = ir.to_proto(linear_model())
    proto.functions.append(
        onnx.helper.make_function("f", "f", ["c"], ["y"], [node], [onnx.helper.make_opsetid("", 18)])
    )
    return proto


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = ir.to_proto(linear_model())
    change(proto)
    return proto


def sparse_constant(proto: onnx.ModelProto) -> None:
    values, indices = (onnx.numpy_helper.from_array(np.ones(1, dtype)) for dtype in (np.float32, np.int64))
    tensor = onnx.helper.make_sparse_tensor(values, indices, [4])
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["s"], sparse_value=tensor))


@pytest.mark.parametrize(
    ("what", "proto"),
    [
        ("training information", changed(lambda proto: proto.training_info.add())),
        ("sparse initializers", changed(lambda proto: proto.graph.sparse_initializer.add())),
        ("sparse initializers", sparse_model()),
        ("sparse constants", changed(sparse_constant)),
        ("device configurations", changed(lambda proto: proto.graph.node[0].device_configurations.add())),
    ],
    ids=["training", "sparse", "sparse-inside", "sparse-constant", "devices"],
)
def test_what_would_be_lost_is_refused(tmp_path, what, proto):
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(ModelError, match=f"x.onnx: holds {what}, which would be lost"):
        files.read(tmp_path / "x.onnx")


def branches(read_outside: bool) -> onnx.ModelProto:
    """An If with an initializer w in one branch; in the other, w is the outer one, or there is none."""
    reads = "w" if read_outside else "x"
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18]>
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {{1, 2}}> {{
            [choice] y = If (c) <
                then_branch = t () => (float[2] u) <float[2] w = {{3, 4}}> {{ u = Add (x, w) }},
                else_branch = e () => (float[2] v) {{ v = Neg ({reads}) }}
            >
        }}"""
    )


def test_a_name_that_means_two_things_is_refused(tmp_path):
    # onnxruntime takes the outer w in both branches, since it hands it to the If
    onnx.save(branches(read_outside=True), tmp_path / "x.onnx")
    with pytest.raises(
        ModelError, match=r"x.onnx: node 'choice' reads 'w' from outside, and a body of it has its own"
    ):
        files.read(tmp_path / "x.onnx")


def test_an_initializer_may_hide_what_no_body_reads(tmp_path):
    onnx.save(branches(read_outside=False), tmp_path / "x.onnx")
    files.read(tmp_path / "x.onnx")


def test_a_tensor_of_an_unknown_type_is_refused(tmp_path):
    proto = ir.to_proto(linear_model())
    proto.graph.initializer[0].data_type = 99
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(ModelError, match=r"x.onnx: not a valid ONNX model"):
        files.read(tmp_path / "x.onnx")


def test_missing_external_data_is_named(external):
    external.with_name("in.data").unlink()
    with pytest.raises(ModelError, match=r"tensor 'w': its data file '.*in.data' is missing"):
        files.read(external)


def test_a_graph_that_is_an_argument_of_a_function_is_refused(tmp_path):
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (bool c, float[n] x) => (float[n] y) { y = own.choose (c, x) }
        <domain: "own", opset_import: ["" : 18]>
        choose <body> (c, x) => (y) { y = If (c) }""")
    (node,) = proto.functions[0].node
    for name in ("then_branch", "else_branch"):
        node.attribute.add(name=name, ref_attr_name="body", type=onnx.AttributeProto.GRAPH)
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=r"in.onnx: a function takes a graph as its attribute 'body'"):
        files.read(tmp_path / "in.onnx")


@pytest.fixture
def scattered(tmp_path):
    """A model whose Constant node, function and body in it have their tensors in files of their own."""

    def elsewhere(name: str) -> onnx.TensorProto:
        tensor = onnx.numpy_helper.from_array(np.full(64, len(name), np.float32), name)
        (tmp_path / f"{name}.data").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, f"{name}.data")
        tensor.ClearField("raw_data")
        return tensor

    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (float[n, 64] x, bool c) => (float[n, 64] y) {
            a = Constant <value = float {0.0}> () r = Add (x, a) y = own.add (r, c)
        }
        <domain: "own", opset_import: ["" : 18]>
        add (x, c) => (y) {
            b = Constant <value = float {0.0}> ()
            r = Add (x, b)
            y = If (c) <then_branch = t () => (float[n, 64] u) <float[64] bb = {0}> { u = Add (r, bb) },
                        else_branch = e () => (float[n, 64] v) { v = Identity (r) }>
        }""")
    proto.graph.node[0].attribute[0].t.CopyFrom(elsewhere("a"))
    body = proto.functions[0].node
    body[0].attribute[0].t.CopyFrom(elsewhere("b"))
    (then,) = [attribute.g for attribute in body[2].attribute if attribute.name == "then_branch"]
    then.initializer[0].CopyFrom(elsewhere("bb"))
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_tensors_in_attributes_and_functions_come_with_the_model(scattered):
    data = {scattered.with_name(f"{name}.data") for name in ("a", "b", "bb")}
    file = files.read(scattered)
    assert file.data_files == data
    output = scattered.parent / "inner" / "out.onnx"
    output.parent.mkdir()
    with files.staged(file.model, output):
        pass
    feeds = {"x": np.zeros((2, 64), np.float32), "c": np.array(True)}
    (y,) = bn.session(output, threads=1).run(None, feeds)
    assert np.array_equal(y, np.full((2, 64), 4.0))
    assert files.read(output).data_files == set()
    written = files.size_of(files.read(scattered).model, output)
    assert written == output.stat().st_size


@pytest.mark.parametrize("name", ["a", "b", "bb"])
def test_data_of_attributes_and_functions_is_checked_and_kept(scattered, name):
    data = scattered.with_name(f"{name}.data")
    with pytest.raises(OutputError, match="is part of the input model"):
        outputs.check_output(files.read(scattered), scattered.with_name(name), force=True)
    data.unlink()
    with pytest.raises(ModelError, match=rf"{name}.data' is missing"):
        files.read(scattered)


def test_truncated_external_data_is_named(external):
    os.truncate(external.with_name("in.data"), 1000)
    with pytest.raises(ModelError, match=r"in.data' is truncated: 1000 bytes, 16384 are needed"):
        files.read(external)


def test_external_data_outside_the_folder_is_refused(external):
    inner = external.parent / "inner"
    inner.mkdir()
    model = ir.load(external)
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "../in.data", 0, 16384, ir.DataType.FLOAT, name="w", shape=ir.Shape([64, 64]), base_dir=inner
    )
    ir.save(model, inner / "evil.onnx")
    with pytest.raises(ModelError, match="outside the model's folder"):
        files.read(inner / "evil.onnx")


def test_a_model_of_links_into_a_store_is_read(external):
    # as Hugging Face keeps downloads: snapshots/<revision>/model.onnx -> ../../blobs/<hash>, and its data
    store, snapshot = external.parent / "blobs", external.parent / "snapshot"
    store.mkdir()
    snapshot.mkdir()
    for name in ("in.onnx", "in.data"):
        external.with_name(name).rename(store / f"hash of {name}")
        (snapshot / name).symlink_to(f"../blobs/hash of {name}")
    file = files.read(snapshot / "in.onnx")
    assert file.model.graph.initializers["w"].const_value.numpy()[1, 0] == 64
    x = np.ones((1, 64), np.float32)
    assert start(file.model, file.path).run(["y"], {"x": x}, "ones")["y"][0, 0] == 64 * 63 * 32
    with pytest.raises(OutputError, match="is part of the input model"):
        outputs.check_output(file, store / "hash of in.data", force=True)


def test_links_to_elsewhere_are_refused(external):
    (external.parent / "elsewhere").mkdir()
    external.with_name("in.data").rename(external.parent / "elsewhere" / "in.data")
    inner = external.parent / "inner"
    inner.mkdir()
    external.rename(inner / "in.onnx")
    (inner / "in.data").symlink_to("../elsewhere/in.data")
    with pytest.raises(ModelError, match="outside the model's folder"):
        files.read(inner / "in.onnx")


def test_data_with_several_hard_links_is_refused_with_a_way_out(external):
    external.with_name("other").hardlink_to(external.with_name("in.data"))
    with pytest.raises(ModelError, match=r"in.data' has several hard links, .*; copy it"):
        files.read(external)


def test_external_data_of_another_length_than_the_shape_is_refused(external):
    model = ir.load(external)
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "in.data", 0, 100, ir.DataType.FLOAT, name="w", shape=ir.Shape([64, 64]), base_dir=external.parent
    )
    ir.save(model, external.with_name("short.onnx"))
    with pytest.raises(ModelError, match=r"100 bytes of data recorded, its shape \[64, 64\] needs 16384"):
        files.read(external.with_name("short.onnx"))


@pytest.mark.parametrize(
    ("name", "force", "message"),
    [
        ("in.onnx", True, "is part of the input model"),
        ("in.data", True, "is part of the input model"),
        ("there.onnx", False, "exists already; .* overwrite it with --force"),
        ("stale.onnx", False, r"stale.onnx.data: exists already"),
        ("folder", True, "is a folder"),
        ("nowhere/out.onnx", False, "does not exist; create it first"),
    ],
)
def test_outputs_that_would_overwrite_or_cannot_be(external, name, force, message):
    folder = external.parent
    (folder / "there.onnx").write_bytes(b"x")
    (folder / "stale.onnx.data").write_bytes(b"x")
    (folder / "folder").mkdir()
    with pytest.raises(OutputError, match=message):
        outputs.check_output(files.read(external), folder / name, force=force)


def test_data_beside_the_output_must_not_be_the_inputs(tmp_path):
    ir.save(linear_model(), tmp_path / "in.onnx", external_data="out.onnx.data", size_threshold_bytes=0)
    with pytest.raises(OutputError, match=r"out.onnx.data: is part of the input model"):
        outputs.check_output(files.read(tmp_path / "in.onnx"), tmp_path / "out.onnx", force=True)


def test_outputs_must_not_be_what_is_read(external):
    folder = external.parent
    (folder / "set" / "test_data_set_0").mkdir(parents=True)
    read = ["in.onnx", "in.data", "recipe.toml", "set/a.npz", "set/test_data_set_0/input_0.pb"]
    for name in (*read[2:], "set/a.onnx", "other.npz", "damaged.onnx"):
        (folder / name).write_bytes(b"x")
    (folder / "link.npz").symlink_to("set/a.npz")
    others = (folder / "recipe.toml", str(folder / "set"), None, {"x": 1}, folder / "missing")
    for name in (*read, "link.npz"):
        with pytest.raises(OutputError, match=rf"{name}: is part of the input .*; choose another"):
            outputs.check_free(folder / name, force=True, models=[external], others=others)
    for name in ("set/a.onnx", "other.npz", "new.npz", "set/new.npz"):
        outputs.check_free(
            folder / name, force=True, models=[external, folder / "damaged.onnx"], others=others
        )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_stays(external):
    pipe = external.with_name("pipe")
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match=r"pipe: is no regular file; choose another output name"):
        outputs.check_free(pipe, force=True)
    with pytest.raises(OutputError, match=r"pipe: is no regular file"):
        outputs.check_output(files.read(external), pipe, force=True)
    with pytest.raises(OutputError, match=r"pipe: is no regular file"):
        outputs.write_text(pipe, "text")
    assert pipe.is_fifo()


@pytest.mark.parametrize(("size", "external"), [(64, False), (1024, True)])
def test_large_weights_go_to_a_page_aligned_file_of_their_own(tmp_path, size, external):
    output = tmp_path / "out.onnx"
    with files.staged(linear_model(size), output) as written:
        assert not output.exists()
        assert written.exists()
    assert files.data_path(output).exists() is external
    tensor = ir.load(output).graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), np.arange(size * size).reshape(size, size))
    if external:
        assert tensor.offset % 4096 == 0


def test_nothing_is_left_when_the_check_fails(external):
    before = sorted(external.parent.iterdir())
    with pytest.raises(KeyboardInterrupt), files.staged(linear_model(1024), external.with_name("out.onnx")):
        raise KeyboardInterrupt
    assert sorted(external.parent.iterdir()) == before


def test_an_overwritten_model_stays_when_the_check_fails(tmp_path):
    output = tmp_path / "out.onnx"
    output.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.staged(linear_model(), output):
        raise RuntimeError
    assert output.read_bytes() == b"old"


def test_an_interrupt_between_the_two_files_brings_the_old_ones_back(tmp_path, monkeypatch):
    output = tmp_path / "out.onnx"
    output.write_bytes(b"old")
    files.data_path(output).write_bytes(b"old data")
    replace = Path.replace

    def interrupted(self, target):
        if target == output and self.parent.name.startswith(".out.onnx."):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.staged(linear_model(1024), output):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "out.onnx": b"old",
        "out.onnx.data": b"old data",
    }


def test_the_data_file_of_an_overwritten_model_goes(tmp_path):
    output = tmp_path / "out.onnx"
    files.data_path(output).write_bytes(b"stale")
    with files.staged(linear_model(), output):
        pass
    assert output.exists()
    assert not files.data_path(output).exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with (
        pytest.raises(OutputError, match=r"out.onnx: cannot write the model: No space left on device"),
        files.staged(linear_model(), tmp_path / "out.onnx"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with files.staged(linear_model(1024), tmp_path / name / "out.onnx"):
            pass
    for file in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_folder_that_takes_no_files_is_refused(external):
    with pytest.raises(
        OutputError, match=r"^/proc/x.onnx: cannot write into its folder: .*; choose another$"
    ):
        outputs.check_output(files.read(external), Path("/proc/x.onnx"), force=False)  # not even root can
