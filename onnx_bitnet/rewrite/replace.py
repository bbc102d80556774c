"""Put the packed op in the place of a linear layer, and leave everything else as it is."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_bitnet.formats import FORMATS, PANEL_OP, to_panels
from onnx_bitnet.graphs import values
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.rotation import Rotation
from onnx_bitnet.rewrite.cleanup import release
from onnx_bitnet.rewrite.functions import DOMAIN, FUNCTIONS, HADAMARD, VERSION
from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.rewrite.records import Linear, Reshaping, unique

LAYER = f"{DOMAIN}.layer"
X = f"{DOMAIN}.x"
Y = f"{DOMAIN}.y"
LAYERS = f"{DOMAIN}.layers"
SEPARATOR = "\n"
"""Between the names in `Y` and `LAYERS` of an op that stands for several layers."""

_FUNCTIONS_SINCE = 8  # IR version
_UNSQUEEZE_INPUT_SINCE = 13  # opset


@dataclass
class Shared:
    """What the replacements in one model share: names that are taken and constants that are there already.

    Args:
        names: every name of a value in the model.
        node_names: every name of a node.
        constants: (what it is, the graph it is in) -> the value, and what keeps the key's identities alive.
        bodies: graphs of functions, which have no initializers.
    """

    names: set[str]
    node_names: set[str]
    constants: dict[Hashable, tuple[ir.Value, object]] = field(default_factory=dict)
    bodies: frozenset[ir.Graph] = frozenset()

    @classmethod
    def of(cls, model: ir.Model) -> Shared:
        """Look at a model."""
        bodies = frozenset(function.graph for function in model.functions.values())
        nodes = [node for root in (model.graph, *bodies) for node in root.all_nodes()]
        names = {str(value.name) for root in (model.graph, *bodies) for value in values(root)}
        return cls(names, {str(node.name) for node in nodes}, {}, bodies)

    def constant(
        self, graph: ir.Graph, key: Hashable, name: str, array: np.ndarray, alive: object = None
    ) -> ir.Value:
        """Return the constant of this key in a graph; make it if it is not there."""
        found = self.constants.get((key, graph))
        if found is None:
            found = self._new(graph, unique(name, self.names), array), alive
            self.constants[key, graph] = found
        return found[0]

    def _new(self, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        if graph not in self.bodies:
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            graph.initializers.add(value)
            return value
        node = ir.Node(
            "", "Constant", [], [ir.AttrTensor("value", tensor)], name=unique(name, self.node_names)
        )
        node.outputs[0].name = name
        graph.insert_before(graph[0], node)
        return node.outputs[0]


def replace(
    model: ir.Model,
    linear: Linear,
    quantized: Quantized,
    *,
    activation_bits: int,
    activation_scale: float = 0.0,
    layout: str = "canonical",
    rotation: Rotation | None = None,
    bias_shift: np.ndarray | None = None,
    shared: Shared | None = None,
) -> ir.Node:
    """Replace one layer by the packed op and return that.

    The op keeps the node's name, doc string and metadata, and y keeps its name. The packed weight is stored
    in the node's own graph, since onnxruntime before 1.29 hides those of outer graphs from custom ops; layers
    of one graph share it if they have an equal `weight.key` and the same `quantized` object. The float weight
    stays until `cleanup`.

    Args:
        model: changed in place: also its functions, opset imports and, if too old for functions, IR version.
        linear: found by `scan` in this model.
        quantized: its weight, `linear.weight.array()`, packed.
        activation_bits: 8, 16 or 32.
        activation_scale: step of statically quantized activations; 0 quantizes each row by its own peak.
        layout: `panel` for i2s weights that lie in the file as kernels read them, or `canonical`.
        rotation: the basis that the weight is in; x is brought into it once for all layers that read it.
        bias_shift: float32 (N,), added to the bias; None for nothing.
        shared: the same object for all replacements in a model; None if there is only this one.
    """
    op_type = PANEL_OP if layout == "panel" else FORMATS[quantized.format].op_type
    declare_op(model, linear.root, op_type)
    edit = Edit(linear, shared or Shared.of(model))
    x = edit.enter(model, rotation)
    packed = edit.packed(quantized, layout)
    node = ir.Node(
        DOMAIN,
        op_type,
        [x, *packed, edit.bias() if bias_shift is None else edit.shifted_bias(bias_shift)],
        ir.convenience.convert_attributes(
            {
                "K": quantized.k,
                "N": quantized.n,
                "block_size": quantized.block_size,
                "activation_bits": activation_bits,
                "activation_scale": float(activation_scale),
            }
        ),
    )
    edit.leave(edit.main(node))
    return node


class Edit:
    """The nodes that are to replace one layer, in order: `enter`, then any with one `main`, then `leave`."""

    def __init__(self, linear: Linear, shared: Shared) -> None:
        self.linear = linear
        self.shared = shared
        self.nodes: list[ir.Node] = []
        graph = linear.node.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph

    def name(self) -> str:
        """The name of the packed op: that of the old node unless it has none or shares it with another."""
        if self.linear.name == self.linear.node.name:
            return self.linear.name
        return unique(self.linear.name, self.shared.node_names)

    def enter(self, model: ir.Model, rotation: Rotation | None) -> ir.Value:
        """Return the activations (..., K), in the basis of the rotation if there is one."""
        return self.turn(model, rotation) if rotation else self.laid_out()

    def laid_out(self) -> ir.Value:
        """Return the activations (..., K) as they are."""
        x = self.linear.x
        for reshaping in self.linear.before:
            x = self.reshape(x, reshaping)
        return x

    def leave(self, y: ir.Value) -> None:
        """Bring y (..., N) to the layout of the layer and put the nodes in its place."""
        for reshaping in self.linear.after:
            y = self.reshape(y, reshaping)
        if self.linear.addend is not None:
            y = self.add_addend(y, self.linear.addend)
        self.splice(y)

    def main(self, node: ir.Node, dtype: ir.DataType | None = None) -> ir.Value:
        """Add the node that multiplies: it bears the layer's name and tells which values it replaced."""
        linear = self.linear
        node.name, node.doc_string = self.name(), linear.node.doc_string
        node.metadata_props.update(linear.node.metadata_props)
        node.metadata_props.update({X: str(linear.x.name), Y: str(linear.y.name)})
        return self.add(node, dtype)

    def add(self, node: ir.Node, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a node with one output, of the activations' type where no other is given."""
        node.metadata_props[LAYER] = self.linear.name
        self.nodes.append(node)
        output = node.outputs[0]
        output.type = ir.TensorType(dtype or self.linear.dtype)
        output.name = unique(f"{self.linear.y.name}.{node.op_type}", self.shared.names)
        return output

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None = None,
        **attributes: int | tuple[int, ...],
    ) -> ir.Value:
        """Add a node of the default domain."""
        name = unique(f"{self.linear.name}.{op_type}", self.shared.node_names)
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), name=name)
        return self.add(node, dtype)

    def to_float32(self, value: ir.Value) -> ir.Value:
        """Cast a value of the activations' type to float32 where it is not that."""
        float32 = ir.DataType.FLOAT
        return value if self.linear.dtype == float32 else self.op("Cast", [value], float32, to=int(float32))

    def to_activations(self, value: ir.Value) -> ir.Value:
        """Cast a float32 value to the activations' type."""
        dtype = self.linear.dtype
        return value if dtype == ir.DataType.FLOAT else self.op("Cast", [value], to=int(dtype))

    def reshape(self, value: ir.Value, reshaping: Reshaping) -> ir.Value:
        """Transpose, reshape or unsqueeze a value."""
        if reshaping.op_type == "Transpose":
            return self.op("Transpose", [value], perm=reshaping.value)
        if reshaping.op_type == "Unsqueeze" and opset_version(self.linear.root) < _UNSQUEEZE_INPUT_SINCE:
            return self.op("Unsqueeze", [value], axes=reshaping.value)
        name = f"{DOMAIN}.shape.{'_'.join(str(dim) for dim in reshaping.value)}"
        return self.op(reshaping.op_type, [value, self.constant(name, np.array(reshaping.value, np.int64))])

    def add_addend(self, value: ir.Value, addend: ir.Value) -> ir.Value:
        """Add what the layer adds that is no constant per output."""
        factor = self.linear.addend_factor
        if factor != 1.0:
            name = f"{DOMAIN}.factor.{self.linear.dtype.name}.{factor}"
            constant = self.constant(name, np.array(factor, self.linear.dtype.numpy()))
            addend = self.op("Mul", [addend, constant])
        return self.op("Add", [value, addend])

    def packed(self, quantized: Quantized, layout: str) -> Iterator[ir.Value]:
        """Yield weight, scale and, where the format has one, zero point."""
        tensors = {quantized.format: quantized.weight, "scale": quantized.scale}
        if layout == "panel":
            tensors = {"panel": to_panels(quantized.weight, quantized.k), "scale": quantized.scale}
        if FORMATS[quantized.format].four_levels:
            tensors["zero_point"] = quantized.zero_point
        for suffix, array in tensors.items():
            yield self.tensor(suffix, array, quantized)

    def tensor(self, suffix: str, array: np.ndarray, made: object) -> ir.Value:
        """A tensor of the weight, named after it; one for all layers that share what was `made`."""
        weight = self.linear.weight
        key = (weight.key, id(made), suffix)
        return self.shared.constant(self.graph, key, f"{weight.name}.{suffix}", array, alive=made)

    def turn(self, model: ir.Model, rotation: Rotation) -> ir.Value:
        """Return the activations (..., K) in the basis of the rotation, made where they are needed first."""
        declare_op(model, self.linear.root, HADAMARD)
        key = ("rotation", self.linear.x.name, self.linear.before, rotation.block_size)
        found = self.shared.constants.get((key, self.graph))
        if found is not None:
            return found[0]
        x = self.laid_out()
        k = rotation.signs.size
        signs = self.constant(f"{DOMAIN}.signs.{k}", rotation.signs)
        node = ir.Node(
            DOMAIN,
            HADAMARD,
            [x, signs],
            ir.convenience.convert_attributes({"block_size": rotation.block_size}),
            name=unique(f"{self.linear.x.name}.{HADAMARD}", self.shared.node_names),
        )
        self.nodes.append(node)
        y = node.outputs[0]
        y.type, y.shape = ir.TensorType(self.linear.dtype), x.shape
        y.name = unique(str(node.name), self.shared.names)
        self.shared.constants[key, self.graph] = y, x
        return y

    def shifted_bias(self, shift: np.ndarray) -> ir.Value:
        """The bias with something added, as a new float32 (N,) constant."""
        bias = self.linear.bias
        old = np.zeros(shift.size) if bias is None else bias.array().astype(np.float64).reshape(-1)
        array = (np.broadcast_to(old, shift.shape) + shift).astype(np.float32)
        return self.constant(f"{self.linear.name}.bias", array)

    def bias(self, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The bias as an (N,) value: the model's own where it is that already; float32 zeros if none."""
        bias, n = self.linear.bias, self.linear.weight.n
        if bias is None:
            return self.constant(f"{DOMAIN}.zeros.{n}", np.zeros(n, np.float32))
        if (
            bias.stored
            and bias.key == (bias.source, (), 1.0)
            and bias.tensor.dtype == dtype
            and bias.shape == (n,)
            and bias.source.graph is self.graph
        ):
            return bias.source
        array = np.broadcast_to(bias.array().astype(dtype.numpy()).reshape(-1), (n,))
        key = (bias.key, n, dtype)
        return self.shared.constant(self.graph, key, f"{bias.name}.bias", np.ascontiguousarray(array))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant that belongs to no weight; once in each graph, by its name."""
        return self.shared.constant(self.graph, name, name, array)

    def splice(self, y: ir.Value) -> None:
        """Put the nodes in the place of the last old one and give y the old value's name and readers."""
        old = self.linear.y
        removed = (self.linear.node, *self.linear.absorbed)
        self.graph.insert_before(removed[-1], self.nodes)
        self.shared.names.discard(str(y.name))
        y.name, y.shape, y.doc_string = old.name, old.shape, old.doc_string
        y.type = old.type or y.type
        y.metadata_props.update(old.metadata_props)
        y.meta.update(old.meta)
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        inputs = [value for node in removed for value in node.inputs if value is not None]
        self.graph.remove(removed, safe=True)
        release(inputs)


def declare(model: ir.Model, root: ir.Graph, domain: str, version: int = 1) -> None:
    """Import a domain where one of its ops is about to be used, and let initializers be constants."""
    if model.ir_version < 4:
        # Until IR version 3 every initializer had to be an input; from 4 on that makes it overridable.
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
    model.ir_version = max(model.ir_version, _FUNCTIONS_SINCE)
    model.opset_imports.setdefault(domain, version)
    root.opset_imports.setdefault(domain, version)


def declare_op(model: ir.Model, root: ir.Graph, op_type: str) -> None:
    """Give the model the op's body and import its domain where it is used."""
    declare(model, root, DOMAIN, VERSION)
    op = (DOMAIN, op_type, "")
    if op not in model.functions:
        # before the functions that call it, because onnx.reference knows only those it has already read
        callers = dict(model.functions)
        model.functions.clear()
        model.functions[op] = FUNCTIONS[op_type](opset_version(model.graph))
        model.functions.update(callers)
