"""Replacing layers: every small graph computes the same afterwards, and nothing else in it changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite.graphs import GRAPHS, Case, K, N, W, build, numbers, pack, ternary
from rewrite.steps import convert, expected, find, initializers, ops, plain, reference, stock, with_library

from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.replace import replace
from onnx_bitnet.rewrite.scan import scan

ALL = pytest.mark.parametrize("case", GRAPHS.values(), ids=GRAPHS.keys())
DENSE = f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = MatMul (x, W) }}"


def packed_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = [node for graph in graphs(model) for node in graph]
    return [node for node in nodes if node.op_type == "MatMulI2S"]


def graphs(model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """The nodes of the main graph, of all subgraphs and of all functions but the op's body."""
    bodies = [list(f.node) for f in model.functions if f.domain != "onnx_bitnet"]
    found = [list(model.graph.node), *bodies]
    for nodes in found:
        for node in nodes:
            found.extend(list(a.g.node) for a in node.attribute if a.HasField("g"))
    return found


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


@ALL
def test_every_layer_is_packed_and_the_model_computes_the_same(case: Case):
    model = convert(case.model)
    onnx.checker.check_model(model, full_check=True)
    assert len(packed_nodes(model)) == case.converted
    want = expected(case)
    for run in (reference, stock, with_library):
        got = run(model, case.feeds)
        assert [array.dtype for array in got] == [array.dtype for array in want]
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=run.__name__)


@ALL
def test_packing_a_packed_model_changes_nothing(case: Case):
    once = convert(case.model)
    assert not [layer for layer in find(once) if isinstance(layer, Linear)]
    assert convert(once) == plain(once)


@ALL
def test_inputs_and_outputs_stay(case: Case):
    model = convert(case.model)
    names = {tensor.name for tensor in case.model.graph.initializer}
    inputs = [value for value in case.model.graph.input if value.name not in names]
    assert list(model.graph.input) == inputs
    assert list(model.graph.output) == list(case.model.graph.output)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "function_weight_argument"])
def test_nodes_that_are_no_part_of_a_layer_keep_their_bytes_and_their_order(name: str):
    case = GRAPHS[name]
    before = [node.SerializeToString() for nodes in graphs(plain(case.model)) for node in nodes]
    after = [
        node
        for nodes in graphs(convert(case.model))
        for node in nodes
        if "onnx_bitnet.layer" not in metadata(node) and not any(a.HasField("g") for a in node.attribute)
    ]
    positions = [before.index(node.SerializeToString()) for node in after if is_old(node)]
    assert positions == sorted(positions)


def is_old(node: onnx.NodeProto) -> bool:
    """Whether a node is none of the Constants that a function body gets."""
    packed = any(mark in node.output[0] for mark in (".i2s", ".scale", ".zero_point", "onnx_bitnet."))
    return not (node.op_type == "Constant" and packed)


def test_metadata_doc_strings_and_domains_stay():
    proto = build(
        f"""g (float[b, {K}] x, bool c) => (float[b, {N}] y) {{
            h = other.Special <level = 3> (x)
            [dense] p = MatMul (h, W)
            q = other.Branch (c, p) <body = t () => (float[b, {N}] u) {{ u = other.Special (p) }}>
            y = Relu (q)
        }}""".replace("(c, p) <body", "<body").replace("}>", "}> (c, p)"),
        W,
        domains=["other"],
    )
    proto.doc_string, proto.producer_name, proto.domain, proto.model_version = "model doc", "tool", "dom", 7
    proto.graph.doc_string = "graph doc"
    proto.metadata_props.add(key="license", value="x")
    proto.graph.node[1].doc_string = "node doc"
    proto.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="model.dense")
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info("p", 1, ["b", N], doc_string="value doc")
    )
    model = convert(proto)
    dense = model.graph.node[1]
    assert dense.op_type == "MatMulI2S"
    assert (dense.name, dense.doc_string, list(dense.output)) == ("dense", "node doc", ["p"])
    assert metadata(dense) == {
        "pkg.torch.onnx.name_scopes": "model.dense",
        "onnx_bitnet.layer": "dense",
        "onnx_bitnet.x": "h",
        "onnx_bitnet.y": "p",
    }
    for index in (0, 2, 3):
        assert model.graph.node[index] == plain(proto).graph.node[index]
    assert [value for value in model.graph.value_info if value.name == "p"] == list(proto.graph.value_info)
    for field in ("doc_string", "producer_name", "domain", "model_version", "metadata_props"):
        assert getattr(model, field) == getattr(proto, field)
    assert model.graph.doc_string == "graph doc"
    assert {i.domain: i.version for i in model.opset_import} == {"": 18, "other": 1, "onnx_bitnet": 1}


def test_every_node_of_a_layer_is_tagged():
    case = GRAPHS["matmul_left"]
    model = convert(case.model)
    assert ops(model) == ["Transpose", "MatMulI2S", "Transpose"]
    assert {metadata(node)["onnx_bitnet.layer"] for node in model.graph.node} == {"y"}
    tags = metadata(model.graph.node[1])
    assert (tags["onnx_bitnet.x"], tags["onnx_bitnet.y"]) == ("x", "y")
    assert len({node.name for node in model.graph.node}) == 3


def test_attributes_and_packed_tensors():
    proto = build(DENSE, W)
    model = ir.from_proto(proto)
    (linear,) = scan(model)
    assert isinstance(linear, Linear)
    quantized = pack(linear)
    node = replace(model, linear, quantized, activation_bits=8, activation_scale=0.25)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values == {"K": K, "N": N, "block_size": 0, "activation_bits": 8, "activation_scale": 0.25}
    assert [value.name for value in node.inputs] == [
        "x",
        "W.i2s",
        "W.scale",
        "W.zero_point",
        f"onnx_bitnet.zeros.{N}",
    ]
    stored = initializers(ir.to_proto(model))
    np.testing.assert_array_equal(stored["W.i2s"], quantized.weight)
    np.testing.assert_array_equal(stored["W.scale"], quantized.scale)
    np.testing.assert_array_equal(stored["W.zero_point"], quantized.zero_point)
    assert not stored[f"onnx_bitnet.zeros.{N}"].any()


def test_new_names_avoid_those_in_the_model():
    proto = build(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ W.i2s = MatMul (x, W) \n y = Relu (W.i2s) }}".replace(
            "W.i2s", "taken"
        ),
        W,
    )
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = ["W.i2s" if name == "taken" else name for name in names]
    model = convert(proto)
    assert list(model.graph.node[0].input)[1] == "W.i2s_2"
    onnx.checker.check_model(model, full_check=True)


def test_duplicate_node_names_become_unique():
    model = convert(GRAPHS["names_duplicate_and_empty"].model)
    names = [node.name for node in model.graph.node]
    assert names == ["same", "y", "same_2", "y_2"]


def test_shared_weight_is_stored_once():
    model = convert(GRAPHS["shared_weight"].model)
    packed = ["W.i2s", "W.scale", "W.zero_point"]
    assert sorted(initializers(model)) == ["B", *packed, f"onnx_bitnet.zeros.{K}"]
    assert [list(node.input[1:4]) for node in model.graph.node] == [packed] * 3


def test_weight_that_is_seen_in_two_ways_is_packed_twice():
    nodes = "p = MatMul (x, W) \n y = Gemm <transB = 1> (p, W)"
    proto = build(f"g (float[b, {K}] x) => (float[b, {K}] y) {{ {nodes} }}", {"W": ternary(K, K)})
    model = convert(proto)
    assert [node.input[1] for node in model.graph.node] == ["W.i2s", "W.i2s_2"]


def test_bias_keeps_its_initializer_where_it_fits():
    nodes = "p = MatMul (x, W) \n q = Add (p, B) \n r = MatMul (x, W) \n s = Add (B, r) \n y = Sub (q, s)"
    proto = build(f"g (float[b, {K}] x) => (float[b, {N}] y) {{ {nodes} }}", W | {"B": numbers(N)})
    model = convert(proto)
    assert ops(model) == ["MatMulI2S", "MatMulI2S", "Sub"]
    assert [node.input[4] for node in model.graph.node[:2]] == ["B", "B"]


@pytest.mark.parametrize("shape", [(), (1,), (1, N)], ids=str)
def test_bias_of_another_shape_is_written_anew(shape: tuple[int, ...]):
    proto = build(
        DENSE.replace("y = MatMul (x, W)", "p = MatMul (x, W) \n y = Add (p, B)"), W | {"B": numbers(*shape)}
    )
    model = convert(proto)
    bias = initializers(model)[model.graph.node[0].input[4]]
    np.testing.assert_array_equal(bias, np.broadcast_to(numbers(*shape).reshape(-1), N))
    assert bias.dtype == np.float32
    assert "B" not in initializers(model)


def test_old_models_become_ir_version_8_and_newer_ones_stay():
    for before, after in ((4, 8), (7, 8), (8, 8), (10, 10)):
        model = convert(build(DENSE, W, ir_version=before, opset=13))
        assert model.ir_version == after
        onnx.checker.check_model(model, full_check=True)


def test_a_model_without_layers_is_not_touched():
    proto = build(f"g (float[b, {K}] x) => (float[b, {K}] y) {{ y = Relu (x) }}", {"unused": ternary(2, 2)})
    assert convert(proto) == plain(proto)
