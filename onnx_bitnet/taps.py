"""Look inside a converted model and its reference: which values to compare, and how to get at them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_bitnet.rewrite.functions import DOMAIN, HADAMARD
from onnx_bitnet.rewrite.plain import BASIS
from onnx_bitnet.rewrite.replace import LAYER, LAYERS, SEPARATOR, Y
from onnx_bitnet.rewrite.replaced import Replaced, leave_float, replaced, rounds

# Before these names the outputs of a layer have its number, so that layers do not feed one another.
_PREFIX = f"{DOMAIN}.tap"


@dataclass(frozen=True)
class Tap:
    """A packed layer, and where its values are in both models.

    Args:
        layer: name of the layer.
        inputs: names of the values that the nodes of the layer read.
        y: name of the value that they make.
        note: why the layer cannot be looked at; empty if it can.
    """

    layer: str
    inputs: tuple[str, ...] = ()
    y: str = ""
    note: str = ""


def find_taps(reference: ir.Model, got: ir.Model) -> tuple[Tap, ...]:
    """Return a tap for each replaced layer of `got`, in graph order, the packed ones first.

    Raises:
        ModelError: a packed op of `got` is malformed.
    """
    known, made = values(reference), values(got)
    return tuple(tap for found in replaced(got) for tap in _taps(found, made, known))


def _taps(found: Replaced, made: Mapping[str, ir.Value], known: Mapping[str, ir.Value]) -> Iterator[Tap]:
    ys = found.node.metadata_props.get(Y, "").split(SEPARATOR)
    layers = found.node.metadata_props.get(LAYERS, found.layer).split(SEPARATOR)
    for layer, y in zip(layers, ys, strict=False):
        yield _tap(layer, y, found.node, made, known)


def _tap(
    layer: str, y: str, node: ir.Node, made: Mapping[str, ir.Value], known: Mapping[str, ir.Value]
) -> Tap:
    if node.outputs[0].name not in made:
        return Tap(layer, note="it is inside a subgraph or function, whose values are out of reach")
    nodes = _layer_nodes(made[y], known) if y in made else []
    if node not in nodes:
        return Tap(layer, note="the model has no record of its float layer; convert it again")
    inputs = [value.name for value in _outer_values(nodes) if value.name]
    for name in (y, *inputs):
        if name not in known:
            return Tap(
                layer, note=f"the reference has no value {name!r}; is it the model that was converted?"
            )
    return Tap(layer, tuple(inputs), y)


def _layer_nodes(y: ir.Value, outer: Container[str]) -> list[ir.Node]:
    """Return the nodes that a layer became, in order: those that make y from values called as in `outer`.

    Some may be other layers', too: what brings x into the basis of all that read it.
    """
    found: set[ir.Node] = set()
    todo = [y]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found and (LAYER in node.metadata_props or _turns(node)):
            found.add(node)
            made = [value for value in node.inputs if value is not None]
            todo += [value for value in made if value.name not in outer or _turns(value.producer())]
    return [node for node in y.graph or () if node in found]


def _turns(node: ir.Node | None) -> bool:
    """Whether a node brings x into another basis, or is one of those that do so in standard ops."""
    if node is None:
        return False
    return BASIS in node.metadata_props or (node.domain, node.op_type) == (DOMAIN, HADAMARD)


def _outer_values(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """Yield the values that nodes read, make not themselves and that are no constants, each once."""
    seen: set[ir.Value] = {value for node in nodes for value in node.outputs}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in seen and ir.convenience.get_const_tensor(value) is None:
                yield value
                seen.add(value)


def values(model: ir.Model) -> dict[str, ir.Value]:
    """Return the values of the main graph that are computed or fed, by name."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    made = [value for node in model.graph for value in node.outputs]
    return {value.name: value for value in (*inputs, *made) if value.name}


def expose(model: ir.Model, names: Iterable[str]) -> None:
    """Make values outputs of the model as well, in place. Inputs stay what they are: the caller has them."""
    known = values(model)
    for name in dict.fromkeys(names):
        value = known[name]
        if not value.is_graph_output() and not value.is_graph_input():
            model.graph.outputs.append(value)


def expose_shapes(model: ir.Model, names: Iterable[str]) -> None:
    """Make the shapes of values outputs of the model, called by `shape_name`, in place."""
    known = values(model)
    for name in dict.fromkeys(names):
        shape = ir.Value(name=shape_name(name), type=ir.TensorType(ir.DataType.INT64))
        model.graph.append(ir.Node("", "Shape", [known[name]], outputs=[shape]))
        model.graph.outputs.append(shape)


def shape_name(name: str) -> str:
    """Return the name of the output that holds the shape of value `name`."""
    return f"{_PREFIX}.shape/{name}"


def output_name(index: int, name: str) -> str:
    """Return the name that value `name` of the layer number `index` has in the model of `layers_alone`."""
    return f"{_PREFIX}{index}/{name}"


def layers_alone(
    got: ir.Model, taps: Sequence[tuple[int, Tap]], types: Mapping[str, ir.DataType], *, float_x: bool = False
) -> ir.Model:
    """Return a model of the packed layers alone, each fed from outside.

    Args:
        got: the converted model; its constants and functions are shared, not copied.
        taps: the layers and their numbers.
        types: element types of all inputs of the taps.
        float_x: leave activations float, whatever the layers' activation bits are, where `separates` says so.

    Returns:
        A model whose inputs are those of the taps and whose outputs, in their order, are called by
        `output_name`.
    """
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(types[name])) for _, tap in taps for name in tap.inputs
    }
    constants: dict[str, ir.Value] = {}
    known = values(got)
    nodes: list[ir.Node] = []
    outputs = []
    for index, tap in taps:
        made: dict[str, ir.Value] = {}
        for node in _layer_nodes(known[tap.y], tap.inputs):
            nodes.append(_copy(node, index, made, inputs, constants))
        outputs.append(made[tap.y])
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports=dict(got.graph.opset_imports),
        name="layers",
    )
    if float_x:
        leave_float(graph)
    return ir.Model(graph, ir_version=got.ir_version, functions=list(got.functions.values()))


def separates(float_x: ir.Model) -> list[bool]:
    """Say for each layer of a model of `layers_alone` with `float_x` whether nothing in it rounds them."""
    return [not rounds(y) for y in float_x.graph.outputs]


def _copy(
    node: ir.Node,
    index: int,
    made: dict[str, ir.Value],
    inputs: Mapping[str, ir.Value],
    constants: dict[str, ir.Value],
) -> ir.Node:
    """Copy a node of layer number `index`; what it makes and the constants it needs go into the dicts."""
    sources = [_source(value, made, inputs, constants) for value in node.inputs]
    outputs = [ir.Value(name=output_name(index, str(value.name))) for value in node.outputs]
    made.update((str(old.name), new) for old, new in zip(node.outputs, outputs, strict=True))
    return ir.Node(node.domain, node.op_type, sources, node.attributes.values(), outputs=outputs)


def _source(
    value: ir.Value | None,
    made: Mapping[str, ir.Value],
    inputs: Mapping[str, ir.Value],
    constants: dict[str, ir.Value],
) -> ir.Value | None:
    if value is None:
        return None
    name = str(value.name)
    found = made.get(name) or inputs.get(name) or constants.get(name)
    if found is None:
        tensor = ir.convenience.get_const_tensor(value)
        found = constants[name] = ir.Value(name=name, const_value=tensor)
    return found
