"""The graphs of a model: which there are, and which are refused when a file is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_bitnet.errors import ModelError


def roots(model: ir.Model, *, without: str | None = None) -> tuple[ir.Graph, ...]:
    """Return the graphs that no other graph holds: the main one and the bodies of functions.

    Args:
        model: the model.
        without: domain whose functions are left out.
    """
    bodies = (function.graph for function in model.functions.values() if function.domain != without)
    return (model.graph, *bodies)


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the graphs in a node's attributes, each with a name for people."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for index, graph in enumerate(attribute.as_graphs()):
                yield f"{attribute.name}[{index}]", graph


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield every value of a graph and of the graphs in it."""
    for part in (graph, *graph.subgraphs()):
        yield from (*part.inputs, *part.initializers.values())
        for node in part:
            yield from node.outputs


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, and what the graphs in it read from outside of them."""
    yield from filter(None, node.inputs)
    yield from _reads_of_bodies(node)


def _reads_of_bodies(node: ir.Node) -> Iterator[ir.Value]:
    for _, body in subgraphs(node):
        inside = {body, *body.subgraphs()}
        for reader in body.all_nodes():
            yield from (value for value in filter(None, reader.inputs) if value.graph not in inside)


def check_proto(path: Path, proto: onnx.ModelProto) -> None:
    """Raise ModelError if the model has parts that the graph library does not carry over."""
    nodes = list(_nodes(proto))
    sparse = {onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS}
    lost = {
        "training information": bool(proto.training_info),
        "sparse initializers": any(graph.sparse_initializer for graph in (proto.graph, *_bodies(nodes))),
        "sparse constants": any(attribute.type in sparse for node in nodes for attribute in node.attribute),
        # which onnx has since 1.18
        "device configurations": any(getattr(node, "device_configurations", ()) for node in nodes),
    }
    for what, there in lost.items():
        if there:
            raise ModelError(f"{path}: holds {what}, which would be lost; export the model without them")
    graph_types = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.ref_attr_name and attribute.type in graph_types:
            raise ModelError(
                f"{path}: a function takes a graph as its attribute {attribute.ref_attr_name!r}, which "
                "onnx_ir cannot read; export the model without that function"
            )


def check(path: Path, model: ir.Model) -> None:
    """Put nodes in the order that ONNX asks for, and refuse what has no one meaning.

    Raises:
        ModelError: a node reads what nothing makes, or a name that means two things, or nodes form a cycle.
    """
    _refuse_ghosts(path, model)
    _refuse_double_meanings(path, model)
    _sort(path, model)


def _refuse_ghosts(path: Path, model: ir.Model) -> None:
    """Raise ModelError if a node reads a value that is nowhere."""
    for root in roots(model):
        for node in root.all_nodes():
            for value in filter(None, node.inputs):
                if not (value.producer() or value.is_graph_input() or value.is_initializer()):
                    reader = node.name or node.outputs[0].name
                    raise ModelError(
                        f"{path}: node {reader!r} reads {value.name!r}, which nothing makes; export it again"
                    )


def _refuse_double_meanings(path: Path, model: ir.Model) -> None:
    """Raise ModelError if a body's initializer has the name of an outer value that reaches the same node.

    ONNX forbids initializers that hide others. onnxruntime takes them, but gives all bodies of a node the
    outer value as soon as one of them reads that.
    """
    for root in roots(model):
        for node in root.all_nodes():
            outer = {value.name for value in _reads_of_bodies(node)}
            own = [name for _, body in subgraphs(node) for name in body.initializers]
            if name := next((name for name in own if name in outer), None):
                raise ModelError(
                    f"{path}: node {node.name or node.op_type!r} reads {name!r} from outside, and a body of "
                    "it has its own, which onnxruntime confuses; rename one"
                )


def _sort(path: Path, model: ir.Model) -> None:
    """Put nodes in the order that ONNX asks for and onnxruntime does without; there, nothing changes."""
    try:
        for graph in roots(model):
            graph.sort()
    except ValueError:
        raise ModelError(f"{path}: nodes of its graph feed each other in a cycle; export it again") from None


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor, in whatever graph or attribute."""
    nodes = list(_nodes(proto))
    for graph in (proto.graph, *_bodies(nodes)):
        yield from graph.initializer
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, in whatever graph or function."""
    pending = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(inner for body in _bodies([node]) for inner in body.node)


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that nodes have as attributes."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g
